"""MT-Bench style questions of two turns (arXiv 2306.05685): how they are read and asked, and what the scores say."""

from collections.abc import Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import ray

from c2f_ray.data.prompts import Messages, PromptSet, PromptSource
from c2f_ray.data.templates import render
from c2f_ray.data.texts import write_rows
from c2f_ray.data.tokenizer import decode, load_tokenizer
from c2f_ray.data.trajectory import Ragged, Trajectories
from c2f_ray.errors import RecipeError
from c2f_ray.evaluation.metrics import mean
from c2f_ray.runtime.waiting import wait_for

TURNS = 2


class TwoTurnSource(PromptSource):
    """Questions in MT-Bench's own format. The prompts are their first turns; the records keep both."""

    def _prompt(self, where: str, record: Any) -> tuple[str, Messages, dict[str, Any]]:
        turns = record.get("turns") if isinstance(record, dict) else None
        if turns is None or not _texts(turns) or not isinstance(record.get("category"), str):
            raise RecipeError(f"{where}: no MT-Bench question: it needs a category, and turns, a list of {TURNS} texts")
        if record.get("reference") is not None and not _texts(record["reference"]):
            raise RecipeError(f"{where}: its reference is not a list of {TURNS} texts")
        messages = [{"role": "user", "content": turns[0]}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        name = record.get("question_id", where.rsplit(":", 1)[-1])
        return str(name), messages, {"reference": None, **record}


def _texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) == TURNS and all(isinstance(text, str) for text in value)


@ray.remote(num_cpus=0)
def second_turn(
    tokenizer: str, template: str, prompts: PromptSet, shards: list[Any], max_tokens: int, timeout_s: float
) -> Ragged:
    """The prompts of the second turn, int32, by sample id of the first; longer ones lose their first tokens."""
    first = Trajectories.concat(wait_for(shards, timeout_s, "answers to first turns"))
    words = load_tokenizer(tokenizer)
    rows: list[list[int]] = []
    for i in np.argsort(first.info.sample_id):
        row = first.info.prompt_row[i]
        messages = [
            *prompts.messages[row],
            {"role": "assistant", "content": decode(words, first.response[i], special=False)},
            {"role": "user", "content": prompts.records[row]["turns"][1]},
        ]
        ids: list[int] = words(render(words, template, messages), add_special_tokens=False)["input_ids"]
        rows.append(ids[-max_tokens:])
    return Ragged.from_rows(rows, np.int32)


@ray.remote(num_cpus=0)
def save_conversations(path: Path, tokenizer: str, shards: list[list[Any]], timeout_s: float) -> None:
    """Writes the answers to each turn, by sample id; `shards` are object references, those of each turn."""
    words = load_tokenizer(tokenizer)
    rows: dict[int, dict[str, Any]] = {}
    for turn, refs in enumerate(shards, start=1):
        answered = Trajectories.concat(wait_for(refs, timeout_s, f"answers to turn {turn}"))
        for i, sample_id in enumerate(answered.info.sample_id.tolist()):
            row = rows.setdefault(sample_id, {"sample_id": sample_id})
            row[f"turn_{turn}"] = decode(words, answered.response[i], special=False)
            row[f"finished_{turn}"] = bool(answered.info.finished[i])
    write_rows(path, [rows[sample_id] for sample_id in sorted(rows)])


def summary(scores: Sequence[Sequence[Sequence[float | None]]], categories: Sequence[str]) -> dict[str, Any]:
    """Scores [runs][questions][turns] in a few numbers; verdicts that were none are left out, and counted.

    `mean` is that of the runs' means, `spread` the sample standard deviation (n - 1) between them, None for one run.
    """
    runs = [mean(score for question in run for score in question) for run in scores]
    known = [value for value in runs if value is not None]
    found: dict[str, list[float | None]] = {}
    for run in scores:
        for category, question in zip(categories, run, strict=True):
            found.setdefault(category, []).extend(question)
    return {
        "mean": mean(known),
        "spread": stdev(known) if len(known) > 1 else None,
        "runs": runs,
        "turns": [mean(question[turn] for run in scores for question in run) for turn in range(TURNS)],
        "categories": {category: mean(its) for category, its in found.items()},
        "left_out": sum(score is None for run in scores for question in run for score in question),
    }
