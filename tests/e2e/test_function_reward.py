"""A reward function of ten lines beside the recipe, as a user has it; it fails for one prompt."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from c2f_ray.watch.metrics import read_metrics
from tests.documented import documented

REWARDS = """
async def score(samples):
    for sample in samples:
        if sample.record["kind"] == "bad":
            raise LookupError("no answer known")
    return [len(sample.response) + 0.5 * sample.finished + 100 * (sample.record["kind"] != "") for sample in samples]
"""


def train(folder: Path, on_failure: str) -> subprocess.CompletedProcess[str]:
    reward = f"reward={{kind: function, function: 'my_rewards:score', workers: 2, on_failure: {on_failure}}}"
    return subprocess.run(
        [Path(sys.executable).with_name("c2f-ray"), *documented("c2f-ray train configs/tiny.yaml --fresh"),
         "run.steps=1", "prompts.per_step=8", "learner.ranks=1", "prompts.source=prompts.jsonl",
         "prompts.shuffle=false", "rollout.samples_per_prompt=2", reward],
        cwd=folder, env=os.environ, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_what_the_function_returns_is_the_reward_and_what_it_fails_for_is_set_aside(
    world: Path, checkout: Callable[[str], Path]
):
    folder = checkout("function_reward")
    lines = (world / "prompts" / "train.jsonl").read_text().splitlines()[:8]
    kinds = ["bad" if number == 3 else "chain" for number in range(8)]
    (folder / "prompts.jsonl").write_text(
        "".join(f'{line[:-1]}, "kind": "{kind}"}}\n' for line, kind in zip(lines, kinds, strict=True))
    )
    (folder / "my_rewards.py").write_text(REWARDS)
    run = folder / "runs" / "tiny"

    stopped = train(folder, "stop")
    assert stopped.returncode == 1
    assert (
        "3 responses of step 1 got no reward; the first: reward function: attempt 3: LookupError: no answer known"
        in (stopped.stderr)
    )
    assert "they are in runs/tiny/aside/unscored_step_000001.parquet; mend the reward" in stopped.stderr
    assert pq.read_table(run / "aside" / "unscored_step_000001.parquet").num_rows == 3

    done = train(folder, "drop")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = pq.read_table(run / "trajectories" / "step_000001.parquet").to_pylist()
    assert len(rows) == 24
    bad = [row["sample_id"] for row in rows if row["reward"] != row["reward"]]
    assert bad == [9, 10, 11], "two samples and the greedy rollout of the fourth prompt"
    for row in rows:
        if row["sample_id"] not in bad:
            assert row["reward"] == pytest.approx(len(row["response"]) + 0.5 * row["finished"] + 100)
    aside = pq.read_table(run / "aside" / "unscored_step_000001.parquet").to_pylist()
    assert [row["sample_id"] for row in aside] == bad
    assert {row["cause"] for row in aside} == {"reward function: attempt 3: LookupError: no answer known"}
    (step,) = read_metrics(run / "metrics.jsonl")
    assert step["reward/dropped"] == 3
    sampled = [row["reward"] for row in rows if not row["greedy"] and row["sample_id"] not in bad]
    assert step["reward/mean"] == pytest.approx(sum(sampled) / 14)
