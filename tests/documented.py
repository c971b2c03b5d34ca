"""The commands that README and docs/ show, in code blocks and in sentences, for the tests that run them.

Each one that needs no more than a laptop is run by a test, which says so by naming it in a call of `documented`;
`tests/unit/test_docs.py` compares those names with the pages.
"""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```\n", flags=re.DOTALL | re.MULTILINE)
PROGRAMS = ("c2f-ray", "kubectl", "make", "python", "ray", "sbatch", "source")  # what pip installs comes from PyPI
NAME = re.compile(r"(c2f-ray|ray|ray job) [\w-]+( --follow)?")  # as in "`ray job stop` leaves a checkpoint"
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}


def command_lines(text: str) -> list[tuple[str, str]]:
    """Each command in one line, with the comment beside it, or the sentence or row of a table that has it."""
    found = []
    for language, block in BLOCK.findall(text):
        if language in ("python", "yaml"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            command, _, comment = line.partition("#")
            if command.split()[:1] and command.split()[0] in PROGRAMS:
                found.append((" ".join(command.split()), comment.strip()))
    for paragraph in BLOCK.sub("\n", text).split("\n\n"):
        for sentence in re.split(r"(?<=[.:;])\s|\n(?=[|])", paragraph):
            for inline in re.findall(r"`([^`]+)`", sentence):
                command = " ".join(inline.split())
                if " " in command and command.split()[0] in PROGRAMS and not NAME.fullmatch(command):
                    found.append((command, " ".join(sentence.split())))
    return found


LINES = [(page, *line) for page, text in TEXTS.items() for line in command_lines(text)]


def documented(command: str) -> list[str]:
    """The arguments of a command that a page shows, for a test that runs it."""
    assert command in [shown for _, shown, _ in LINES], f"no page shows {command}"
    return shlex.split(command)[1:]
