"""Lookup chains: a question that cannot be answered in one step, but easily in several.

`b=c,a=2,f=e,e=a,c=3,d=f,b?` asks for the digit that `b` leads to: `b=c`, `c=3`, so 3. Two of the six letters hold
digits; the query is one to four links away from its own. A tiny model that answers at once guesses between the two
digits; one that writes the chain out reads each line off the question. So more analysis earns more reward here.

Response texts are lines: a derivation is `b=c`, `c=3`, `so 3`; a direct answer is `so 3` alone; a check block is a line
`check` and a derivation again, which is pure redundancy once the first derivation is right.
"""

import dataclasses
import random
import re
import zlib
from collections.abc import Iterator
from typing import Any

LETTERS = "abcdef"
DIGITS = "0123456789"
CHECK = "check"
QUESTION = "Q:"

STEP_LINE = re.compile(r"([a-f])=([a-f0-9])")
ANSWER_LINE = re.compile(r"so ([0-9])")
# What a line may look like when the length limit cut it: worth nothing yet, but no junk either.
UNFINISHED_LINE = re.compile(r"|[a-f]=?|s|so ?|c|ch|che|chec")
CONTENT = re.compile(r"(?:[a-f]=[a-f0-9],)+[a-f]\?")


@dataclasses.dataclass(frozen=True)
class Question:
    """The entries `(letter, letter or digit)` in the order they are printed, and the letter asked for."""

    entries: tuple[tuple[str, str], ...]
    query: str

    @property
    def content(self) -> str:
        """The user message, e.g. `c=3,b=c,b?`."""
        return ",".join(f"{left}={right}" for left, right in self.entries) + f",{self.query}?"

    @property
    def chain(self) -> tuple[tuple[str, str], ...]:
        """The entries from the query to its digit, in order."""
        table = dict(self.entries)
        steps, letter = [], self.query
        while letter in table:
            steps.append((letter, table[letter]))
            letter = table.pop(letter)
        return tuple(steps)

    @property
    def answer(self) -> str:
        return self.chain[-1][1]

    @property
    def depth(self) -> int:
        """Lines of the derivation before its answer: 2 to 5."""
        return len(self.chain)

    @property
    def other_digit(self) -> str:
        """The digit of the other root: the natural wrong answer."""
        return next(right for _, right in self.entries if right in DIGITS and right != self.answer)


def is_heldout(content: str) -> bool:
    """A tenth of all questions, chosen by their text alone, is never trained on by any stage."""
    return zlib.crc32(content.encode()) % 10 == 0


def draw_question(rng: random.Random, heldout: bool = False) -> Question:
    """One question of the asked split; the number of links is uniform over 1 to 4."""
    while True:
        letters = rng.sample(LETTERS, len(LETTERS))
        digits = rng.sample(DIGITS, 2)
        links = rng.randint(1, 4)
        asked, other = letters[: links + 1], letters[links + 1 :]
        entries = [
            (left, right)
            for tree, digit in ((asked, digits[0]), (other, digits[1]))
            for left, right in zip(tree, [digit, *tree[:-1]], strict=True)
        ]
        rng.shuffle(entries)
        question = Question(tuple(entries), asked[-1])
        if is_heldout(question.content) == heldout:
            return question


def parse_question(prompt: str) -> Question:
    """The last question in a prompt, whatever template is around it. ValueError if there is none."""
    found = CONTENT.findall(prompt)
    if not found:
        raise ValueError(f"no lookup question such as 'b=c,c=3,b?' in the prompt {prompt!r}")
    *entries, query = found[-1].split(",")
    return Question(tuple((entry[0], entry[2]) for entry in entries), query[0])


def derivation(question: Question) -> list[str]:
    """The right lines of a block, its answer included."""
    return [*(f"{left}={right}" for left, right in question.chain), f"so {question.answer}"]


def derived(question: Question, num_checks: int = 0) -> list[str]:
    """A right derivation followed by `num_checks` check blocks."""
    block = derivation(question)
    return block + [CHECK, *block] * num_checks


def direct(question: Question, right: bool = True) -> list[str]:
    """An answer without analysis."""
    return [f"so {question.answer if right else question.other_digit}"]


def corrupt(lines: list[str], rng: random.Random) -> list[str]:
    """The same lines with one mistake: a changed digit or letter, or a line dropped, doubled or swapped."""
    lines = list(lines)
    at = rng.randrange(len(lines))
    kind = rng.choice(("change", "change", "change", "drop", "double", "swap"))
    if kind == "drop" and len(lines) > 1:
        del lines[at]
    elif kind == "double":
        lines.insert(at, lines[at])
    elif kind == "swap" and at + 1 < len(lines) and lines[at] != lines[at + 1]:
        lines[at], lines[at + 1] = lines[at + 1], lines[at]
    else:
        lines[at] = change_line(lines[at], rng)
    return lines


def change_line(line: str, rng: random.Random) -> str:
    """One character of a line replaced by another of its kind; a `check` line becomes an answer."""
    if line == CHECK:
        return f"so {rng.choice(DIGITS)}"
    at = rng.choice((0, 2)) if line[1] == "=" else len(line) - 1
    kind = DIGITS if line[at] in DIGITS else LETTERS
    return line[:at] + rng.choice(kind.replace(line[at], "")) + line[at + 1 :]


def line_utilities(question: Question, lines: list[str]) -> Iterator[float]:
    """What each line adds to a response's worth (ours): the labels that the reward model is trained towards.

    First block: right steps share 0.8, a wrong one costs 0.8, the answer is worth +-1, a repeated line -0.1.
    Check block k: 0.05 for its header, 0.15 shared by its right steps, 0.15 for its right answer, all times
    0.8^(k-1), and -0.3 for a wrong line. Another question -1, after which nothing counts. Any other line -0.3.
    """
    table = dict(question.entries)
    block, closed, letter = 0, False, question.query
    seen: set[str] = set()
    for i, line in enumerate(lines):
        fade = 0.8 ** (block - 1)  # means nothing in the first block
        step, final = STEP_LINE.fullmatch(line), ANSWER_LINE.fullmatch(line)
        if line.startswith(QUESTION):
            yield -1.0
            break
        if line == CHECK and closed:
            block, closed, letter, seen = block + 1, False, question.query, set()
            yield 0.05 * 0.8 ** (block - 1)  # `fade` is still the last block's
        elif step and not closed and line in seen:
            yield -0.1
        elif step and not closed:
            right = step[1] == letter and table.get(letter) == step[2]
            share = 0.8 if block == 0 else 0.15 * fade
            yield share / question.depth if right else (-0.8 if block == 0 else -0.3)
            letter = step[2]
            seen.add(line)
        elif final and not closed:
            right = final[1] == question.answer
            yield (1.0 if right else -1.0) if block == 0 else (0.15 * fade if right else -0.3)
            closed = True
        elif i == len(lines) - 1 and UNFINISHED_LINE.fullmatch(line):
            yield 0.0
        else:
            yield -0.3


def utility(question: Question, response: str, ended: bool) -> float:
    """Worth of a response text, cut anywhere; one that ends itself without any answer costs 1."""
    lines = response.split("\n")
    unanswered = ended and not any(ANSWER_LINE.fullmatch(line) for line in lines)
    return sum(line_utilities(question, lines)) - (1.0 if unanswered else 0.0)


def accuracy(record: dict[str, Any], response: str, finished: bool) -> dict[str, float]:
    """Grade any model's response to a lookup question, which is the last of the record's `messages`.

    The answer is the first `so` line of the first block, that is before any `check` line or further question: what a
    reader would stop at, and what redundancy after it can neither earn nor spoil. `accuracy` is 1 if it is right;
    `strict` is 1 if moreover the model ended the response by itself (`finished`) and did not run on into a question.
    """
    question = parse_question(record["messages"][-1]["content"])
    lines = response.strip().split("\n")
    right = False
    for line in lines:
        if line.startswith((CHECK, QUESTION)):
            break
        if final := ANSWER_LINE.fullmatch(line.strip()):
            right = final[1] == question.answer
            break
    clean = finished and not any(line.startswith(QUESTION) for line in lines)
    return {"accuracy": float(right), "strict": float(right and clean)}
