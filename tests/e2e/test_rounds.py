"""Iterative rejection sampling, as a driver script runs it, on the tiny world's layout."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from c2f_ray import load_recipe, train
from c2f_ray.learner.checkpoint import SavedPieces
from c2f_ray.watch.metrics import read_metrics

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
LEARNER = (
    "learner={algorithm: rejection_sampling, ranks: 2, gpus_per_rank: 0, responses_per_update: 4, patience: 9,"
    " restart_from: start, timeout_s: 120, optimizer: {lr: 5.0e-3}}"
)
SETTINGS = [
    "run.steps=3", "run.deterministic=true", "prompts.per_step=8", "rollout.samples_per_prompt=3",
    "length={rule: fixed, max_tokens: 16}", "evaluate.num_prompts=4", "checkpoints.every_steps=1",
    "checkpoints.keep_last=3", LEARNER,
]  # fmt: skip


@pytest.fixture(scope="module")
def run(cluster: None, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounds")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "tiny").symlink_to(world, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(load_recipe(CONFIG, *SETTINGS))
    return folder / "runs" / "tiny"


def test_each_round_keeps_the_best_of_every_prompt(run: Path):
    for number, line in enumerate(read_metrics(run / "metrics.jsonl"), start=1):
        rows = pq.read_table(run / "trajectories" / f"step_{number:06d}.parquet").to_pylist()
        assert [row["greedy"] for row in rows] == [False] * 24
        best = [max(row["reward"] for row in rows[i : i + 3]) for i in range(0, 24, 3)]
        assert line["selection/kept"] == 8
        assert line["selection/reward_mean"] == pytest.approx(sum(best) / 8, abs=1e-6)
        assert line["reward/mean"] == pytest.approx(sum(row["reward"] for row in rows) / 24, abs=1e-6)
        assert line["learner/responses"] + line["learner/duplicates"] == 8
        assert line["learner/steps"] == 2


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
