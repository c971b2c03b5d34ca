"""Iterative rejection sampling by a Mixtral pair's log ratio, on the tiny world."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from c2f_ray.cli import app
from c2f_ray.learner.checkpoint import SavedPieces
from c2f_ray.runtime.trace import read_trace, spans_of
from c2f_ray.watch.metrics import read_metrics, without_timing
from tests.documented import documented

COMMAND = documented("c2f-ray train configs/tiny_rejection_sampling.yaml")
SETTINGS = [
    "run.name=rounds", "run.steps=3", "run.deterministic=true", "prompts.per_step=8", "rollout.samples_per_prompt=4",
    "length.max_tokens=16", "evaluate.num_prompts=8", "checkpoints.every_steps=1", "checkpoints.keep_last=3",
    "learner.responses_per_update=4", "learner.patience=9", "learner.restart_from=start", "learner.epochs=2",
    "learner.optimizer.lr=3.0e-3", "run.trace=true",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(cluster: None, checkout: Callable[[str], Path]) -> Path:
    folder = checkout("rounds")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        app([*COMMAND, *SETTINGS], standalone_mode=False)
        app([*COMMAND, *SETTINGS, "run.name=again", "run.steps=1"], standalone_mode=False)
    return folder / "runs" / "rounds"


def test_the_same_seed_gives_the_same_round(run: Path):
    lines = [read_metrics(folder / "metrics.jsonl")[0] for folder in (run, run.with_name("again"))]
    first, again = (without_timing(line) for line in lines)
    assert first == again
    for name in ("step_000001", "heldout_000000", "heldout_000001"):
        files = [folder / "trajectories" / f"{name}.parquet" for folder in (run, run.with_name("again"))]
        assert pq.read_table(files[0]).to_pylist() == pq.read_table(files[1]).to_pylist()


def test_each_round_keeps_the_best_of_every_prompt(run: Path):
    for number, line in enumerate(read_metrics(run / "metrics.jsonl"), start=1):
        rows = pq.read_table(run / "trajectories" / f"step_{number:06d}.parquet").to_pylist()
        assert [row["greedy"] for row in rows] == [False] * 32
        best = [max(row["reward"] for row in rows[i : i + 4]) for i in range(0, 32, 4)]
        assert line["selection/kept"] == 8
        assert line["selection/reward_mean"] == pytest.approx(sum(best) / 8, abs=1e-6)
        ratio = [row["reward_log_ratio_policy"] - row["reward_log_ratio_reference"] for row in rows]
        assert ratio == pytest.approx([row["reward"] for row in rows], rel=1e-6)
        assert line["reward/mean"] == pytest.approx(sum(row["reward"] for row in rows) / 32, abs=1e-6)
        assert line["learner/responses"] + line["learner/duplicates"] == 8
        assert line["learner/steps"] == 4


def test_the_heldout_reward_rises_in_the_first_rounds(run: Path):
    lines = read_metrics(run / "metrics.jsonl")
    assert lines[0]["heldout/best_of_n"] > lines[0]["heldout/before"]
    assert lines[1]["heldout/best_of_n"] > lines[0]["heldout/before"]


def test_the_peak_round_is_the_coarse_actor(run: Path):
    lines = read_metrics(run / "metrics.jsonl")
    curve = [float(line["heldout/best_of_n"] or 0) for line in lines]
    peak = curve.index(max(curve)) + 1
    assert lines[-1]["heldout/peak_round"] == peak
    state = json.loads((run / "checkpoints" / "step_000003" / "state.json").read_text())["run"]
    assert state["heldout"] == [lines[0]["heldout/before"], *curve]
    assert state["mean_reward"] == curve[-1]
    coarse = load_file(run / "coarse" / "model.safetensors")
    for number in (1, 2, 3):
        pieces = SavedPieces(sorted((run / "checkpoints" / f"step_00000{number}").glob("policy-rank*.safetensors")))
        same = [
            torch.equal(pieces.read(f"weight/model.{name}", 0, tensor.numel(), tensor.numel()), tensor.flatten())
            for name, tensor in coarse.items()
        ]
        assert all(same) == (number == peak)


def test_the_trace_has_every_stage_shard_and_scoring_call(run: Path):
    spans = spans_of(read_trace(run))
    stages = [(span.row, span.step) for span in spans if span.step and span.row in ("rollout", "learner", "weights")]
    round_and_held_out = ("rollout", "learner", "weights", "rollout")
    assert stages == [(row, step) for step in (1, 2, 3) for row in round_and_held_out]
    for row in ("rollout 0", "reward log_ratio_policy 0", "reward log_ratio_reference 0"):
        mine = [span for span in spans if span.row.split(" (")[0] == row]
        assert sum(int(span.name.split()[0]) for span in mine) == 3 * 32 + 4 * 32, row
    first = next(span for span in spans if span.row == "rollout 0")
    asked = next(span for span in spans if span.row == "reward log_ratio_policy 0")
    assert first.ended is not None and 0 <= asked.began - first.ended < 5
