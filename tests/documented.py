"""The commands that README and docs/ show, for the tests that run them.

Each one that needs no more than a laptop is run by a test, which says so by naming it in a call of `documented`;
`tests/unit/test_docs.py` compares those names with the pages.
"""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}


def command_lines(text: str) -> list[tuple[str, str]]:
    """Each command of the code blocks, in one line, and the comment beside it."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        if language in ("python", "yaml"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            command, _, comment = line.partition("#")
            if command.split()[:1] and command.split()[0] in ("c2f-ray", "make", "python", "ray"):
                found.append((" ".join(command.split()), comment.strip()))
    return found


LINES = [(page, *line) for page, text in TEXTS.items() for line in command_lines(text)]


def documented(command: str) -> list[str]:
    """The arguments of a command that a page shows, for a test that runs it."""
    assert command in [shown for _, shown, _ in LINES], f"no page shows {command}"
    return shlex.split(command)[1:]
