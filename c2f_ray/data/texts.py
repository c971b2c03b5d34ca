"""What the models wrote, as text: decoded where the tokens are, never in the driver."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from c2f_ray.data.atomic import replacing
from c2f_ray.data.prompts import PromptSet
from c2f_ray.data.tokenizer import decode, load_tokenizer
from c2f_ray.data.trajectory import Trajectories
from c2f_ray.runtime.waiting import wait_for

Columns = dict[str, list[float]]  # of the rows of one shard, by name


def text_rows(
    tokenizer: PreTrainedTokenizerBase, prompts: PromptSet, shards: list[Trajectories], columns: list[Columns]
) -> list[dict[str, Any]]:
    """One row for each trajectory, by sample id; ``columns`` are what else is known of a shard's rows."""
    rows = [
        {
            "sample_id": int(shard.info.sample_id[i]),
            "prompt_id": prompts.ids[shard.info.prompt_row[i]],
            "greedy": bool(shard.info.greedy[i]),
            "finished": bool(shard.info.finished[i]),
            **{name: value[i] for name, value in more.items()},
            "weight_version": int(shard.info.weight_version[i]),
            "newest_weight_version": int(max(shard.token_version[i], default=shard.info.weight_version[i])),
            "prompt": decode(tokenizer, shard.prompt[i], special=True),
            "response": decode(tokenizer, shard.response[i], special=False),
            "response_tokens": int(shard.info.response_tokens[i]),
        }
        for shard, more in zip(shards, columns, strict=True)
        for i in range(len(shard))
    ]
    return sorted(rows, key=lambda row: row["sample_id"])


def unscored_path(path: Path) -> Path:
    """Where the trajectories of the file at ``path`` that have no reward are, with the causes."""
    return path.parents[1] / "aside" / f"unscored_{path.name}"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a Parquet file."""
    with replacing(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows), partial)


class TrajectoryWriter:
    """An actor: writes one step after the other, so that one process alone decodes beside the engines."""

    def __init__(self, tokenizer: str, timeout_s: float) -> None:
        """``timeout_s``: for a step's shards to be there."""
        self.tokenizer = load_tokenizer(tokenizer)
        self.timeout_s = timeout_s

    def write(
        self,
        path: Path,
        step: int,
        prompts: PromptSet,
        shards: list[Any],
        columns: list[Columns],
        causes: list[dict[int, str]],
        left: set[int],
    ) -> None:
        """Writes a step's trajectories; those that no reward came for once more, aside, with the cause.

        `shards` are object references; ``causes`` tells, for each, why a row has no reward; samples whose ids are
        ``left`` to the next step will be in its file.
        """
        shards = wait_for(shards, self.timeout_s, f"the trajectories of step {step}")
        why = {
            int(shard.info.sample_id[row]): cause
            for shard, found in zip(shards, causes, strict=True)
            for row, cause in found.items()
        }
        texts = text_rows(self.tokenizer, prompts, shards, columns)
        rows = [{"step": step, **row} for row in texts if row["sample_id"] not in left]
        write_rows(path, rows)
        if why:
            aside = [{**row, "cause": why[row["sample_id"]]} for row in rows if row["sample_id"] in why]
            write_rows(unscored_path(path), aside)
