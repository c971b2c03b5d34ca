"""Prompts: read, checked, rendered and tokenised once, before any actor starts."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from c2f_ray.data.templates import render
from c2f_ray.data.trajectory import Ragged
from c2f_ray.errors import RecipeError

Messages = list[dict[str, str]]
Read = Callable[[int], tuple[str, Any]]  # row to (where it is, the record)
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class PromptSet:
    """``N`` prompts. The driver puts it into the object store once; steps then speak of rows."""

    ids: list[str]
    messages: list[Messages]  # what the reward model's own template renders
    records: list[dict[str, Any]]  # each prompt's other fields, for graders
    tokens: Ragged  # int32 token ids of the policy's rendered prompt
    num_dropped: int  # prompts longer than the limit

    def __len__(self) -> int:
        return len(self.ids)

    def __add__(self, other: "PromptSet") -> "PromptSet":
        """These prompts, and after them the other's."""
        tokens = [part[row] for part in (self.tokens, other.tokens) for row in range(len(part))]
        return PromptSet(
            self.ids + other.ids,
            self.messages + other.messages,
            self.records + other.records,
            Ragged.from_rows(tokens, np.int32),
            self.num_dropped + other.num_dropped,
        )


@dataclass(frozen=True)
class PromptSource:
    """Where prompts come from. `key` is the dotted key that errors name."""

    key: str
    source: str
    split: str = "train"
    field: str = "messages"
    turns: Literal["all", "first"] = "all"
    system: str | None = None
    num_prompts: int | None = None
    seed: int = 0

    def load(self) -> list[tuple[str, Messages, dict[str, Any]]]:
        """All prompts as (id, messages, other fields); a seeded choice of `num_prompts` when that is set."""
        count, read = self._open()
        rows = list(range(count))
        if not rows:
            raise RecipeError(f"{self.key}: {self.source}: holds no prompts")
        if self.num_prompts is not None:
            if self.num_prompts > count:
                raise RecipeError(f"{self.key}: {self.source}: holds {count} prompts, fewer than {self.num_prompts}")
            rows = sorted(np.random.default_rng(self.seed).permutation(count)[: self.num_prompts].tolist())
        return [self._prompt(*read(row)) for row in rows]

    def _open(self) -> tuple[int, Read]:
        """How many records there are, and how to read one: those not asked for are never turned into Python objects."""
        path = Path(self.source)
        if path.suffix not in (".jsonl", ".parquet"):
            dataset = self._dataset()
            return len(dataset), lambda row: (f"{self.source} row {row + 1}", dataset[row])
        if not path.is_file():
            raise RecipeError(f"{self.key}: {self.source}: no such file")
        if path.suffix == ".jsonl":
            records = list(self._jsonl_records(path))
            return len(records), lambda row: records[row]
        try:
            table = pq.read_table(path)
        except pa.ArrowException as error:
            raise RecipeError(f"{self.key}: {self.source}: not a Parquet file: {error}") from None
        return len(table), lambda row: (f"{self.source} row {row + 1}", table.slice(row, 1).to_pylist()[0])

    def _jsonl_records(self, path: Path) -> Iterator[tuple[str, Any]]:
        """Every record with the line that an error about it names."""
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    raise RecipeError(f"{self.source}:{number}: not valid JSON: {error}") from None
                yield f"{self.source}:{number}", record

    def _dataset(self) -> Any:
        from datasets import load_dataset

        try:
            return load_dataset(self.source, split=self.split)
        except Exception as error:  # the library raises a different type for every way of failing
            raise RecipeError(
                f"{self.key}: {self.source}: neither a .jsonl or .parquet file nor a dataset that could be loaded "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no text'})"
            ) from None

    def _prompt(self, where: str, record: Any) -> tuple[str, Messages, dict[str, Any]]:
        if not isinstance(record, dict) or self.field not in record:
            has = f"; it has {', '.join(record)}" if isinstance(record, dict) else ""
            raise RecipeError(f"{where}: no field {self.field!r}{has}")
        value = record[self.field]
        messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
        if not _are_messages(messages):
            raise RecipeError(
                f"{where}: {self.field!r} is neither text nor chat messages "
                f"(a list of {{role, content}}, roles {', '.join(ROLES)}, at least one of them user)"
            )
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        end = users[0] if self.turns == "first" else users[-1]
        messages = [{"role": m["role"], "content": m["content"]} for m in messages[: end + 1]]
        if self.system is not None:
            messages = [m for m in messages if m["role"] != "system"]
            messages.insert(0, {"role": "system", "content": self.system})
        others = {name: entry for name, entry in record.items() if name not in (self.field, "id")}
        return str(record.get("id", where.rsplit(":" if ":" in where else " ", 1)[-1])), messages, others


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(m, dict) and isinstance(m.get("content"), str) and m.get("role") in ROLES for m in value)
        and any(m["role"] == "user" for m in value)
    )


def build_prompt_set(
    source: PromptSource,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_tokens: int,
    too_long: Literal["drop", "refuse"],
) -> PromptSet:
    """Renders and tokenises every prompt; those longer than `max_tokens` are dropped and counted, or refused."""
    ids: list[str] = []
    messages: list[Messages] = []
    records: list[dict[str, Any]] = []
    tokens: list[list[int]] = []
    num_dropped = 0
    seen: set[str] = set()
    for prompt_id, conversation, record in source.load():
        if prompt_id in seen:  # seeds are made from ids: two equal ones would be sampled alike
            raise RecipeError(f"{source.key}: {source.source}: prompt id {prompt_id!r} is given twice")
        seen.add(prompt_id)
        prompt = tokenizer(_render(tokenizer, template, conversation, prompt_id, source), add_special_tokens=False)[
            "input_ids"
        ]
        if not prompt:
            raise RecipeError(f"{source.key}: prompt {prompt_id!r} is empty: the chat template leaves nothing of it")
        if len(prompt) > max_tokens:
            if too_long == "refuse":
                hint = ", or set prompts.too_long to drop" if source.key == "prompts.source" else ""
                raise RecipeError(
                    f"{source.key}: prompt {prompt_id!r} has {len(prompt)} tokens, more than prompts.max_tokens "
                    f"{max_tokens}; raise the limit{hint}"
                )
            num_dropped += 1
            continue
        ids.append(prompt_id)
        messages.append(conversation)
        records.append(record)
        tokens.append(prompt)
    if not ids:
        raise RecipeError(f"{source.key}: all {num_dropped} prompts are longer than max_tokens {max_tokens}")
    return PromptSet(ids, messages, records, Ragged.from_rows(tokens, np.int32), num_dropped)


def _render(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Messages, prompt_id: str, source: PromptSource
) -> str:
    try:
        return render(tokenizer, template, messages)
    except TemplateError as error:  # a syntax error, or a template that refuses this conversation
        raise RecipeError(f"{source.key}: prompt {prompt_id!r}: the chat template fails on it: {error}") from None


def prompt_groups(prompts: PromptSet, field: str | None) -> list[list[int]]:
    """Rows of the prompts with the same value of ``field``, by first appearance; all in one group without a field."""
    if field is None:
        return [list(range(len(prompts)))]
    groups: dict[str, list[int]] = {}
    for row, record in enumerate(prompts.records):
        if field not in record:
            has = ", ".join(record) or "no other fields"
            raise RecipeError(f"prompts.uniform_over: prompt {prompts.ids[row]} has no field {field!r}; it has {has}")
        groups.setdefault(str(record[field]), []).append(row)
    return list(groups.values())


def draw(position: int, count: int, groups: list[list[int]], seed: int, shuffle: bool) -> list[tuple[int, int]]:
    """The `count` prompts from `position` on as (row, epoch): the groups in turn, each in a seeded order per epoch.

    `position` counts prompts since the start of the run, and is all the state that there is.
    """
    drawn: list[tuple[int, int]] = []
    for turn in range(position, position + count):
        place, number = divmod(turn, len(groups))
        epoch, i = divmod(place, len(groups[number]))
        order = _order(len(groups[number]), (seed, epoch, number)) if shuffle else range(len(groups[number]))
        drawn.append((groups[number][int(order[i])], epoch))
    return drawn


def request_seed(run_seed: int, prompt_id: str, epoch: int, sample: int) -> int:
    """The sampling seed of one request, in [0, 2^63): asked again, on any engine, it gives the same tokens."""
    digest = hashlib.blake2b(f"{run_seed}/{prompt_id}/{epoch}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@lru_cache(maxsize=64)
def _order(count: int, seed: tuple[int, ...]) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(count)
