"""Leave-one-out baselines through the command line: the numbers in the metrics are those of the trajectories."""

from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from c2f_ray.cli import app
from c2f_ray.watch.metrics import read_metrics
from tests.documented import documented

SETTINGS = ["run.steps=2", "prompts.per_step=4", "length.max_tokens=24"]


def test_each_sample_is_compared_with_the_others_of_its_draw(
    cluster: None, checkout: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(checkout("group"))
    app([*documented("c2f-ray train configs/tiny_group_baseline.yaml"), *SETTINGS], standalone_mode=False)
    run = Path("runs/tiny_group_baseline")
    first, second = read_metrics(run / "metrics.jsonl")
    rows = pq.read_table(run / "trajectories" / "step_000001.parquet").to_pylist()
    assert [row["sample_id"] for row in rows] == list(range(16))
    assert not any(row["greedy"] for row in rows)
    returns = 0.0
    for _, draw in groupby(rows, key=lambda row: row["sample_id"] // 4):
        draw = list(draw)
        total = sum(row["reward"] for row in draw)
        returns += sum((row["reward"] - (total - row["reward"]) / 3) * row["response_tokens"] for row in draw)
    tokens = sum(row["response_tokens"] for row in rows)
    assert first["learner/return_mean"] == pytest.approx(returns / tokens, abs=1e-5), "the KL is 0 in the first step"
    assert first["reward/baseline_mean"] == pytest.approx(first["reward/mean"], abs=1e-5)
    assert first["cm/critic"] > 0, "the spread of reward minus baseline guides the length rule"
    assert second["kl/sequence"] != 0
