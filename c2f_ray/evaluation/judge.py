"""A judge: a model behind an OpenAI-compatible endpoint that is asked for verdicts in words.

Invariants: a verdict is on the disk as soon as it is given, and is never asked for again; one that does not say
exactly what was asked for is none, and is counted; the API key is read here, and is in no file, log or error.
"""

import asyncio
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from c2f_ray.errors import JudgeError, RecipeError
from c2f_ray.recipe import EndpointJudge

LETTER = re.compile(r"\[\[([ABC])\]\]")
SCORE = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
SCORES = (1.0, 10.0)  # the least and the most


@dataclass(frozen=True)
class Question:
    """What the judge is asked."""

    about: tuple[str, ...]  # what for: two questions about different things are never one, if their texts are equal
    text: str

    def key(self, judge: EndpointJudge) -> str:
        """The same question to the same judge under the same parameters has the same key."""
        asked = [self.about, self.text, judge.model, judge.parameters]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def load_template(key: str, path: str, example: dict[str, Any], shown: Sequence[str]) -> Template:
    """A Jinja template of the user's. Raises RecipeError naming `key` where it does not show all that is `shown`."""
    if not Path(path).is_file():
        raise RecipeError(f"{key}: {path}: no such file")
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    try:
        template = environment.from_string(Path(path).read_text(encoding="utf-8"))
        text = template.render(example)
    except (TemplateError, UnicodeDecodeError) as error:
        raise RecipeError(f"{key}: {path}: {error}; it is given {', '.join(example)}") from None
    if missing := [value for value in shown if value not in text]:
        raise RecipeError(f"{key}: {path}: of an example it leaves out {', '.join(map(repr, missing))}")
    return template


def check_judge(judge: EndpointJudge) -> None:
    name = judge.api_key_env
    if name is not None and not os.environ.get(name):
        raise RecipeError(f"evaluate.judge.api_key_env: {name}: the environment has no such variable; export it")


def letter(text: str) -> str | None:
    """`A` or `B`, the better answer, or `C`, a tie: the one that is in double brackets. None for any other verdict."""
    found = set(LETTER.findall(text))
    return found.pop() if len(found) == 1 else None


def score(text: str) -> float | None:
    """The one number from 1 to 10 that is in double brackets. None for any other verdict."""
    found = {float(number) for number in SCORE.findall(text)}
    value = found.pop() if len(found) == 1 else None
    return value if value is not None and SCORES[0] <= value <= SCORES[1] else None


def ask(judge: EndpointJudge, questions: Sequence[Question], path: Path) -> list[str]:
    """The judge's verdicts, as it worded them. Those in `path`, a .jsonl file, are not asked for again.

    Raises JudgeError, with the verdicts so far in `path`, when the endpoint fails `max_retries` times for one.
    """
    verdicts = _read(path)
    keys = [question.key(judge) for question in questions]
    path.parent.mkdir(parents=True, exist_ok=True)
    missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in verdicts}
    if missing:
        asyncio.run(_ask(judge, missing, path))
        verdicts = _read(path)
    return [verdicts[key] for key in keys]


def _read(path: Path) -> dict[str, str]:
    """Verdicts by key. A last line that a killed process has left unfinished is cut off."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return {record["key"]: record["verdict"] for record in map(json.loads, whole.splitlines())}


async def _ask(judge: EndpointJudge, questions: dict[str, Question], path: Path) -> None:
    from openai import AsyncOpenAI, OpenAIError

    api_key = os.environ[judge.api_key_env] if judge.api_key_env else "none"
    gate = asyncio.Semaphore(judge.requests_at_once)
    client = AsyncOpenAI(api_key=api_key, base_url=judge.url, timeout=judge.timeout_s, max_retries=judge.max_retries)

    failed: list[OpenAIError] = []

    async def one(key: str, question: Question) -> None:
        async with gate:
            if failed:  # nothing more is asked, but what is being answered is waited for
                return
            try:
                reply = await client.chat.completions.create(
                    model=judge.model,
                    messages=[{"role": "user", "content": question.text}],
                    extra_body=judge.parameters,
                )
            except OpenAIError as error:
                failed.append(error)
                return
        content = reply.choices[0].message.content if reply.choices else None
        record = {"key": key, "about": question.about, "judge": judge.model, "verdict": content or ""}
        file.write(json.dumps(record) + "\n")
        file.flush()

    with path.open("a", encoding="utf-8") as file:
        async with client:
            await asyncio.gather(*(one(key, question) for key, question in questions.items()))
    if failed:
        reason = f"{type(failed[0]).__name__}: {failed[0]}".replace(api_key, "***")
        raise JudgeError(
            f"evaluate.judge: {judge.url}: {reason}; the verdicts so far are in {path}, and evaluating again asks for "
            "the others"
        )
