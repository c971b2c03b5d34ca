"""A step samples while the last one learns: who made which sample, and that each prompt counts once."""

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from c2f_ray.cli import app
from c2f_ray.data.prompts import draw
from c2f_ray.watch.metrics import read_metrics
from tests.documented import documented

SETTINGS = [
    "prompts.per_step=8", "length.max_tokens=24", "rollout.max_staleness=1", "learner.importance_clip=2.0",
    "checkpoints.every_steps=2", "learner.ranks=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(cluster: None, checkout: Callable[[str], Path]) -> Path:
    """Two steps, and then, from their checkpoint, three more."""
    folder = checkout("pipeline")
    more_steps = documented("c2f-ray train configs/tiny.yaml run.steps=48")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        app([*more_steps, *SETTINGS, "run.steps=2"], standalone_mode=False)
        app([*more_steps, *SETTINGS, "run.steps=5"], standalone_mode=False)
    return folder / "runs" / "tiny"


def test_samples_lag_by_one_version_at_most(run: Path):
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["weights/version"] for line in lines] == [1, 2, 3, 4, 5]
    # What was under way beyond a checkpoint is sampled anew, by the weights that the checkpoint holds.
    assert [line["weights/staleness"] for line in lines] == [0, 1, 0, 1, 1]
    for step, version in zip(range(1, 6), [0, 0, 2, 2, 3], strict=True):
        rows = pq.read_table(run / "trajectories" / f"step_{step:06d}.parquet").to_pylist()
        assert {row["weight_version"] for row in rows} == {version}
    stale = [line["importance/max"] for line in lines if line["weights/staleness"]]
    fresh = [line["importance/max"] for line in lines if not line["weights/staleness"]]
    assert min(stale) > 1.01 > 1 + 1e-4 > max(fresh), "the ratio corrects for the version that made the sample"


def test_each_prompt_is_learned_from_once_and_in_turn(run: Path, world: Path):
    count = len((world / "prompts" / "train.jsonl").read_text().splitlines())
    expected = [row for row, _ in draw(0, 40, [list(range(count))], 1, True)]
    found = []
    for step in range(1, 6):
        rows = pq.read_table(run / "trajectories" / f"step_{step:06d}.parquet").to_pylist()
        found += [int(row["prompt_id"].removeprefix("train-")) for row in rows if not row["greedy"]]
    assert found == expected


@pytest.fixture(scope="module")
def partial(run: Path) -> Path:
    """Four engine slots for sixteen samples a step; of its prompts half are waited for. The reward is the example's."""
    command = documented(
        "c2f-ray train configs/tiny.yaml"
        " \"reward={kind: function, function: 'examples.my_rewards:score'}\" run.name=mine"
    )
    settings = [
        *SETTINGS, "run.steps=5", "rollout.max_staleness=2", "rollout.in_flight=continue",
        "rollout.wait_for=0.5", "rollout.max_num_seqs=4", "rollout.shard_samples=2",
        "length={rule: fixed, max_tokens: 96}",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run.parents[1])
        app([*command, *settings], standalone_mode=False)
    return run.parent / "mine"


def test_a_tail_that_was_not_waited_for_is_learned_from_once_in_the_next_step(partial: Path, world: Path):
    lines = read_metrics(partial / "metrics.jsonl")
    left = [line["prompts/left"] for line in lines]
    assert sum(left) > 0 and left[-1] == 0
    count = len((world / "prompts" / "train.jsonl").read_text().splitlines())
    expected = [row for row, _ in draw(0, 40, [list(range(count))], 1, True)]
    found, mixed = [], 0
    for step, line in enumerate(lines, start=1):
        rows = pq.read_table(partial / "trajectories" / f"step_{step:06d}.parquet").to_pylist()
        sampled = [int(row["prompt_id"].removeprefix("train-")) for row in rows if not row["greedy"]]
        assert sampled == [int(row["prompt_id"].removeprefix("train-")) for row in rows if row["greedy"]]
        carried = left[step - 2] if step > 1 else 0
        assert len(sampled) == 8 + carried - line["prompts/left"]
        assert step - 1 - min(row["weight_version"] for row in rows) == line["weights/staleness"] <= 2
        mixed += sum(row["newest_weight_version"] > row["weight_version"] for row in rows)
        found += sampled
    assert sorted(found) == sorted(expected)
    assert mixed > 0, "no sample went on with new weights"
