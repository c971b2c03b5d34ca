"""What the models wrote, as text: decoded where the tokens are, never in the driver."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from transformers import PreTrainedTokenizerBase

from c2f_ray.data.prompts import PromptSet
from c2f_ray.data.tokenizer import decode, load_tokenizer
from c2f_ray.data.trajectory import Float32, Trajectories
from c2f_ray.waiting import wait_for


def text_rows(
    tokenizer: PreTrainedTokenizerBase, prompts: PromptSet, shards: list[Trajectories], rewards: list[Float32]
) -> list[dict[str, Any]]:
    """One row for each trajectory, by sample id."""
    rows = [
        {
            "sample_id": int(shard.info.sample_id[i]),
            "prompt_id": prompts.ids[shard.info.prompt_row[i]],
            "greedy": bool(shard.info.greedy[i]),
            "finished": bool(shard.info.finished[i]),
            "reward": float(reward[i]),
            "weight_version": int(shard.info.weight_version[i]),
            "prompt": decode(tokenizer, shard.prompt[i], special=True),
            "response": decode(tokenizer, shard.response[i], special=False),
            "response_tokens": int(shard.info.response_tokens[i]),
        }
        for shard, reward in zip(shards, rewards, strict=True)
        for i in range(len(shard))
    ]
    return sorted(rows, key=lambda row: row["sample_id"])


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A Parquet file that is complete or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    pq.write_table(pa.Table.from_pylist(rows), partial)
    partial.rename(path)


@ray.remote(num_cpus=0)
def save_trajectories(
    path: Path,
    step: int,
    tokenizer: str,
    prompts: PromptSet,
    shards: list[Any],
    rewards: list[Float32],
    timeout_s: float,
) -> None:
    """Writes a step's trajectories; `shards` are object references."""
    shards = wait_for(shards, timeout_s, f"the trajectories of step {step}")
    rows = text_rows(load_tokenizer(tokenizer), prompts, shards, rewards)
    write_rows(path, [{"step": step, **row} for row in rows])
