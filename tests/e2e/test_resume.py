"""A run that is killed goes on as if nothing had happened: the same metrics and the same bytes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from c2f_ray.watch.metrics import read_metrics, without_timing

CONFIGS = Path(__file__).parents[2] / "configs"
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

# The command line, in a process that kills itself and all that it started at a given point of a checkpoint.
KILLED = """
import os, signal, sys
import psutil
from c2f_ray import checkpoints, cli

step, where = int(sys.argv.pop(1)), sys.argv.pop(1)
original = checkpoints.commit

def commit(partial, folder):
    here = folder.name == f"step_{step:06d}"
    if here and where == "before":
        kill()
    original(partial, folder)
    if here and where == "after":
        kill()

def kill():
    this = psutil.Process()
    processes = this.children(recursive=True)
    for process in processes:
        process.send_signal(signal.SIGSTOP)  # none may act on the death of another
    for process in [*processes, this]:
        process.send_signal(signal.SIGKILL)

checkpoints.commit = commit
cli.main()
"""


@pytest.fixture(scope="module")
def folder(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which configs/*.yaml find their world."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "tiny").symlink_to(world, target_is_directory=True)
    (folder / "configs").symlink_to(CONFIGS, target_is_directory=True)
    return folder


def train(folder: Path, config: str, name: str, *overrides: str) -> str:
    """What `c2f-ray train` prints."""
    settings = [f"run.name={name}", *SMALL, *(PPO if config == "tiny_ppo" else []), *overrides]
    done = subprocess.run(
        [sys.executable, "-m", "c2f_ray", "train", f"configs/{config}.yaml", *settings],
        cwd=folder, env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def train_until_killed(folder: Path, config: str, name: str, step: int, where: str) -> None:
    settings = [f"run.name={name}", *SMALL, *(PPO if config == "tiny_ppo" else [])]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(step), where, "train", f"configs/{config}.yaml", *settings],
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.wait(timeout=300) == -signal.SIGKILL


@pytest.mark.parametrize("config", ["tiny", "tiny_ppo"])
def test_a_killed_run_ends_like_one_that_was_not(folder: Path, config: str):
    """Killed when the third checkpoint is there, then while the fifth is written."""
    train(folder, config, f"{config}_straight")
    name = f"{config}_killed"
    run = folder / "runs" / name
    train_until_killed(folder, config, name, step=3, where="after")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step_00000{i}" for i in (1, 2, 3)]
    train_until_killed(folder, config, name, step=5, where="before")
    partial = run / "checkpoints" / "step_000005.partial"
    assert (partial / "manifest.json").is_file(), "all but the rename was done"
    said = train(folder, config, name)
    assert f"runs/{name}/checkpoints/step_000005.partial: was not finished" in said
    assert f"continues from runs/{name}/checkpoints/step_000004" in said

    straight = folder / "runs" / f"{config}_straight"
    lines = [[without_timing(line) for line in read_metrics(path / "metrics.jsonl")] for path in (straight, run)]
    assert [line["step"] for line in lines[0]] == [1, 2, 3, 4, 5, 6]
    assert lines[0] == lines[1]
    weights = [(path / "coarse" / "model.safetensors").read_bytes() for path in (straight, run)]
    assert weights[0] == weights[1]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_000005", "step_000006"]
    assert not any(
        str(run.parent) in " ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])
    )


def test_a_checkpoint_with_a_flipped_byte_is_refused_by_name(folder: Path):
    """The one before it is used; a finished run is left alone until it is asked for more steps."""
    run = folder / "runs" / "tiny_killed"
    assert "has all of its 6 steps already" in train(folder, "tiny", "tiny_killed")
    before = (run / "coarse" / "model.safetensors").read_bytes()
    newest = run / "checkpoints" / "step_000006"
    (file,) = newest.glob("policy-rank00001-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    said = train(folder, "tiny", "tiny_killed", "learner.ranks=1")
    assert f"step_000006: {file.name} does not match its checksum" in said
    assert "continues from runs/tiny_killed/checkpoints/step_000005" in said
    assert "changed since the run was last started: learner.ranks: 2 before, 1 now" in said
    after = (run / "coarse" / "model.safetensors").read_bytes()
    assert after != before, "one rank rounds differently from two"
    assert json.loads((run / "checkpoints" / "step_000006" / "state.json").read_text())["run"]["position"] == 72
