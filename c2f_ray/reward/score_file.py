"""A recipe's reward over a file of prompts and responses, or of preference pairs.

Invariant: the output has one complete line for each record that was scored, in the input's order; a job that ended
early goes on behind the last of them.
"""

import json
from collections import deque
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from rich.progress import Progress

from c2f_ray.data.inputs import with_absolute_folders
from c2f_ray.data.prompts import PromptSource
from c2f_ray.errors import BadRewardError, RecipeError
from c2f_ray.recipe import Recipe
from c2f_ray.recipe.roles import reward_roles
from c2f_ray.reward.check import check_reward
from c2f_ray.reward.rewards import Rewards, ScoredShard
from c2f_ray.reward.samples import Sample
from c2f_ray.runtime.session import ray_session

SHARD_RECORDS = 32
SHARDS_AHEAD = 8  # on their way to the workers
PAIR = ("chosen", "rejected")


@dataclass(frozen=True)
class Record:
    id: str
    samples: dict[str, Sample]  # by the field that the response was in


def score(recipe: Recipe, source: Path, out: Path) -> dict[str, float]:
    """Writes a line of JSON for each record of `source`: its id, and the reward of `response`, or of both of a pair.

    `source` is read as `prompts.source` is, with the recipe's `prompts.field`, `turns` and `system`; a record also has
    `response` (and `finished`, true when not given), or `chosen` and `rejected`. A pair's accuracy counts a tie as one
    half. Returns what there is of `mean`, `accuracy`, `records` and `unscored`. Raises RecipeError; BadRewardError when
    a response gets no reward and the recipe does not go on without it.
    """
    recipe = with_absolute_folders(recipe)
    records, done = check_score(recipe, source, out)
    left = records[len(done) :]
    with ray_session(recipe, reward_roles(recipe)), ExitStack() as stack:
        progress = stack.enter_context(Progress())
        bar = progress.add_task(f"scoring {source.name}", total=len(records), completed=len(done))
        rewards = stack.enter_context(
            closing(Rewards(recipe.reward, recipe.cluster, recipe.policy.model, ray.put(None), ordered=True))
        )
        rewards.wait_until_ready()
        out.parent.mkdir(parents=True, exist_ok=True)
        settings_path(out).write_text(reward_settings(recipe))
        file = stack.enter_context(out.open("a", encoding="utf-8"))
        shards = iter([left[start : start + SHARD_RECORDS] for start in range(0, len(left), SHARD_RECORDS)])
        pending: deque[tuple[list[Record], Any]] = deque()
        while True:
            while len(pending) < SHARDS_AHEAD and (shard := next(shards, None)):
                pending.append((shard, _submit(rewards, shard)))
            if not pending:
                break
            shard, asked = pending.popleft()
            scored = rewards.collect([asked])[0]
            lines = _lines(shard, scored)
            if scored.causes and not scored.drop:
                culprit = next(line for line, record in zip(lines, shard, strict=True) if _failed(line, record))
                raise BadRewardError(f"no reward for {culprit}; mend the reward, or set its on_failure to drop")
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            done += lines
            progress.advance(bar, len(shard))
    return summary(done)


def check_score(recipe: Recipe, source: Path, out: Path) -> tuple[list[Record], list[dict[str, Any]]]:
    """The records, and the lines that an earlier start has written. Raises RecipeError."""
    check_reward(recipe.reward)
    settings = recipe.prompts
    prompts = PromptSource("--in", str(source), field=settings.field, turns=settings.turns, system=settings.system)
    records = [_record(str(source), *prompt) for prompt in prompts.load()]
    if not out.exists():
        return records, []
    if not settings_path(out).is_file() or settings_path(out).read_text() != reward_settings(recipe):
        raise RecipeError(f"--out: {out}: was written with another reward; give another file, or remove it")
    whole, _, half = out.read_text(encoding="utf-8").rpartition("\n")
    done = [json.loads(line) for line in whole.splitlines()]
    if [line["id"] for line in done] != [record.id for record in records[: len(done)]]:
        raise RecipeError(f"--out: {out}: is not the beginning of the scores of {source}; give another file")
    if half:  # the last start was killed as it wrote
        out.write_text("".join(json.dumps(line) + "\n" for line in done), encoding="utf-8")
    return records, done


def _record(source: str, prompt_id: str, messages: Any, fields: dict[str, Any]) -> Record:
    names = PAIR if "chosen" in fields else ("response",)
    wrong = [name for name in names if not isinstance(fields.get(name), str)]
    if wrong:
        raise RecipeError(f"--in: {source}: record {prompt_id!r} has no text in {wrong[0]!r}; give response, or a pair")
    finished = bool(fields.get("finished", True))
    return Record(prompt_id, {name: Sample(messages, fields[name], finished, fields) for name in names})


def _submit(rewards: Rewards, records: list[Record]) -> Any:
    samples = [sample for record in records for sample in record.samples.values()]
    lengths = np.array([len(sample.response) for sample in samples])  # what the load is measured by
    return rewards.submit(ray.put(samples), lengths, np.array([sample.finished for sample in samples]))


def _lines(records: list[Record], scored: ScoredShard) -> list[dict[str, Any]]:
    columns = scored.columns()
    lines, row = [], 0
    for record in records:
        line: dict[str, Any] = {"id": record.id}
        for name in record.samples:
            values = {column: values[row] for column, values in columns.items()}
            if cause := scored.causes.get(row):
                values = {"reward": None, "cause": cause}
            line |= values if name == "response" else {name: values}
            row += 1
        lines.append(line)
    return lines


def _failed(line: dict[str, Any], record: Record) -> bool:
    return any("cause" in (line if name == "response" else line[name]) for name in record.samples)


def summary(lines: list[dict[str, Any]]) -> dict[str, float]:
    pairs = [(line["chosen"]["reward"], line["rejected"]["reward"]) for line in lines if "chosen" in line]
    singles = [line["reward"] for line in lines if "chosen" not in line]
    whole = [pair for pair in pairs if None not in pair]
    found = {"records": float(len(lines)), "unscored": float(len(pairs) - len(whole) + singles.count(None))}
    if rewards := [reward for reward in singles if reward is not None]:
        found["mean"] = float(np.mean(rewards))
    if whole:
        found["accuracy"] = float(
            np.mean([(chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in whole])
        )
    return found


def settings_path(out: Path) -> Path:
    return out.with_name(out.name + ".reward.json")


def reward_settings(recipe: Recipe) -> str:
    return json.dumps(recipe.reward.model_dump(), indent=1)
