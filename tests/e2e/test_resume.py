"""A run that is killed goes on as if nothing had happened: the same metrics and the same bytes."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from c2f_ray import load_recipe, train
from c2f_ray.watch.metrics import read_metrics, without_timing

SMALL = [
    "run.steps=6", "run.deterministic=true", "checkpoints.every_steps=1", "prompts.per_step=12",
    "rollout.shard_samples=8", "length.max_tokens=24",
]  # fmt: skip
PPO = [
    "learner.critic.warmup_steps=1",
    "learner.minibatches=3",
    "learner.kl_target=0.1",
    "learner.normalise_reward=true",
]

# The command line, in a process that kills itself and all that it started before a checkpoint is renamed.
KILLED = """
import os, signal, sys
import psutil
from pathlib import Path
from c2f_ray import cli

step = int(sys.argv.pop(1))
original = Path.rename

def rename(partial, folder):
    if Path(folder).name == f"step_{step:06d}":
        kill()
    return original(partial, folder)

def kill():
    this = psutil.Process()
    processes = this.children(recursive=True)
    for process in processes:
        process.send_signal(signal.SIGSTOP)  # none may act on the death of another
    for process in [*processes, this]:
        process.send_signal(signal.SIGKILL)

Path.rename = rename
cli.main()
"""


@pytest.fixture(scope="module")
def folder(checkout: Callable[[str], Path]) -> Path:
    return checkout("resume")


def settings(config: str, name: str) -> list[str]:
    return [f"run.name={name}", *SMALL, *(PPO if config == "tiny_ppo" else [])]


def train_until_killed(folder: Path, config: str, name: str, step: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(step), "train", f"configs/{config}.yaml", *settings(config, name)],
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.wait() == -signal.SIGKILL


def test_a_killed_run_ends_like_one_that_was_not(
    cluster: None, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Killed with all that it had started while it wrote its fourth checkpoint: it goes on after the third step.

    By PPO, which keeps more than ReMax does: a critic, a coefficient that adapts, and moments of the rewards. ReMax
    goes back to a checkpoint in test_survival.py.
    """
    config = "tiny_ppo"
    monkeypatch.chdir(folder)
    recipes = [
        load_recipe(f"configs/{config}.yaml", *settings(config, f"{config}_{how}")) for how in ("calm", "killed")
    ]
    straight = train(recipes[0])
    train_until_killed(folder, config, f"{config}_killed", step=4)
    run = Path("runs") / f"{config}_killed"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step_000002", "step_000003", "step_000004.partial",
    ]  # fmt: skip
    assert (run / "checkpoints" / "step_000004.partial" / "manifest.json").is_file(), "all but the rename was done"
    assert len(read_metrics(run / "metrics.jsonl")) == 4
    capsys.readouterr()
    train(recipes[1])
    said = capsys.readouterr().out
    assert f"{run}/checkpoints/step_000004.partial: was not finished" in said
    assert f"continues from {run}/checkpoints/step_000003" in said

    lines = [[without_timing(line) for line in read_metrics(path / "metrics.jsonl")] for path in (straight, run)]
    assert [line["step"] for line in lines[0]] == [1, 2, 3, 4, 5, 6]
    assert lines[0] == lines[1]
    weights = [(path / "coarse" / "model.safetensors").read_bytes() for path in (straight, run)]
    assert weights[0] == weights[1]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_000005", "step_000006"]


def test_a_checkpoint_with_a_flipped_byte_is_refused_by_name(
    cluster: None, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The one before it is used; a finished run is left alone."""
    monkeypatch.chdir(folder)
    run = Path("runs/tiny_ppo_killed")
    recipe = load_recipe("configs/tiny_ppo.yaml", *settings("tiny_ppo", "tiny_ppo_killed"))
    capsys.readouterr()
    train(recipe)
    assert "has 6 steps already, and 6 are asked for" in capsys.readouterr().out
    before = (run / "coarse" / "model.safetensors").read_bytes()
    newest = run / "checkpoints" / "step_000006"
    (file,) = newest.glob("policy-rank00001-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    train(load_recipe("configs/tiny_ppo.yaml", *settings("tiny_ppo", "tiny_ppo_killed"), "learner.ranks=1"))
    said = capsys.readouterr().out
    assert f"step_000006: {file.name} does not match its checksum" in said
    assert "continues from runs/tiny_ppo_killed/checkpoints/step_000005" in said
    assert "changed since the run was last started: learner.ranks: 2 before, 1 now" in said
    after = (run / "coarse" / "model.safetensors").read_bytes()
    assert after != before, "one rank rounds differently from two"
    assert json.loads((run / "checkpoints" / "step_000006" / "state.json").read_text())["run"]["position"] == 72
