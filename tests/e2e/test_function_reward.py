"""A reward function of ten lines beside the recipe, as a user has it."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

CONFIGS = Path(__file__).parents[2] / "configs"
REWARDS = """
async def score(samples):
    return [len(sample.response) + 0.5 * sample.finished + 100 * (sample.record["kind"] != "") for sample in samples]
"""


def test_rewards_are_what_the_function_returns(world: Path, tmp_path: Path):
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "tiny").symlink_to(world, target_is_directory=True)
    lines = (world / "prompts" / "train.jsonl").read_text().splitlines()[:40]
    (tmp_path / "prompts.jsonl").write_text("".join(line[:-1] + ', "kind": "chain"}\n' for line in lines))
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    done = subprocess.run(
        [Path(sys.executable).with_name("c2f-ray"), "train", CONFIGS / "tiny.yaml", "run.steps=1",
         "prompts.per_step=8", "prompts.source=prompts.jsonl",
         "reward={kind: function, function: 'my_rewards:score', workers: 2}"],
        cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = pq.read_table(tmp_path / "runs" / "tiny" / "trajectories" / "step_000001.parquet").to_pylist()
    assert len(rows) == 16
    for row in rows:
        assert row["reward"] == pytest.approx(len(row["response"]) + 0.5 * row["finished"] + 100)
