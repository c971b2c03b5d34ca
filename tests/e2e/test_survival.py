"""Actors that die or hang in the middle of a run: it ends like a calm one. The whole matrix is `make chaos`."""

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from c2f_ray import load_recipe, train
from c2f_ray.watch.metrics import MetricsLine, read_metrics, without_timing
from tests.chaos.monkey import Monkey

SETTINGS = [
    "run.steps=5", "run.deterministic=true", "rollout.actors=2", "prompts.per_step=12", "rollout.shard_samples=4",
    "length.max_tokens=24", "checkpoints.every_steps=2", "weights.timeout_s=20", "reward.workers=2",
]  # fmt: skip
# An engine at the start, one in a transfer, a scoring worker, and a rank in an update, which takes a step back.
PLAN = {(1, "generation"): ["rollout"], (2, "transfer"): ["rollout"], (3, "scoring"): ["reward"]}
PLAN |= {(4, "learning"): ["learner"]}
# An engine and a rank that hang are as good as dead when their deadline is over. The rank's
# death took a step back, so what is step 7 here is the run's fifth.
HANG = {(3, "generation"): ["rollout"], (7, "learning"): ["learner"]}
DEADLINES = ["rollout.timeout_s=20", "learner.timeout_s=40"]
FROM_THE_ENGINE = ("logprob_gap/", "importance/")  # in other company last bits differ


@pytest.fixture(scope="module")
def runs(cluster: None, checkout: Callable[[str], Path]) -> dict[str, Path]:
    folder = checkout("survival")
    monkey = Monkey(dict(PLAN), dict(HANG))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(load_recipe("configs/tiny.yaml", "run.name=calm", *SETTINGS))
        with monkey.about():
            train(load_recipe("configs/tiny.yaml", "run.name=stormy", *SETTINGS, *DEADLINES))
    happened = [(step, event) for step, event, _ in monkey.killed]
    assert sorted(happened) == sorted([*PLAN, *HANG])
    return {name: folder / "runs" / name for name in ("calm", "stormy")}


def comparable(line: MetricsLine) -> MetricsLine:
    return {key: value for key, value in without_timing(line).items() if not key.startswith(FROM_THE_ENGINE)}


def test_deaths_and_hangs_leave_no_trace_in_weights_and_metrics(runs: dict[str, Path]):
    lines = {name: [comparable(line) for line in read_metrics(run / "metrics.jsonl")] for name, run in runs.items()}
    assert [line["step"] for line in lines["stormy"]] == [1, 2, 3, 4, 5]
    assert lines["calm"] == lines["stormy"]
    weights = {name: (run / "coarse" / "model.safetensors").read_bytes() for name, run in runs.items()}
    assert weights["calm"] == weights["stormy"]


def test_every_sample_was_made_once_and_with_the_weights_of_its_step(runs: dict[str, Path]):
    for step in range(1, 6):
        rows = {
            name: pq.read_table(run / "trajectories" / f"step_{step:06d}.parquet").to_pylist()
            for name, run in runs.items()
        }
        assert rows["calm"] == rows["stormy"]
        assert [row["sample_id"] for row in rows["stormy"]] == list(range(24))
        assert {row["weight_version"] for row in rows["stormy"]} == {step - 1}
