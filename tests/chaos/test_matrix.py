"""SIGKILL of each role in each phase, and a seeded soak: every run ends with the bytes of an undisturbed one."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from c2f_ray import load_recipe, train
from c2f_ray.watch.metrics import read_metrics, without_timing
from tests.chaos.monkey import EVENTS, ROLES, Monkey, Plan

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "tiny.yaml"
STEPS = 16
SETTINGS = [
    f"run.steps={STEPS}", "run.deterministic=true", "rollout.actors=2", "prompts.per_step=12",
    "rollout.shard_samples=4", "length.max_tokens=24", "checkpoints.every_steps=1", "weights.timeout_s=20",
    "reward.workers=2", "reward.attempts=20", "cluster.max_restarts=60",
]  # fmt: skip
# A shard that has cost many workers is scored a row at a time, whose last bits are others: hence the attempts.
SOAK_SEED, SOAK_KILLS = 20, 20
FROM_THE_ENGINE = ("logprob_gap/", "importance/")


@pytest.fixture(scope="module")
def folder(checkout: Callable[[str], Path]) -> Path:
    return checkout("chaos")


def run(folder: Path, name: str, plan: Plan) -> tuple[Path, Monkey]:
    monkey = Monkey(dict(plan))
    with pytest.MonkeyPatch.context() as patch, monkey.about():
        patch.chdir(folder)
        train(load_recipe(CONFIG, f"run.name={name}", *SETTINGS))
    return folder / "runs" / name, monkey


@pytest.fixture(scope="module")
def calm(cluster: None, folder: Path) -> Path:
    return run(folder, "calm", {})[0]


def outcome(run: Path) -> tuple[list, bytes, list]:
    """What must not depend on deaths: metrics, weights, and which prompts were learned from in which step."""
    lines = [
        {key: value for key, value in without_timing(line).items() if not key.startswith(FROM_THE_ENGINE)}
        for line in read_metrics(run / "metrics.jsonl")
    ]
    samples = [
        [(row["prompt_id"], row["sample_id"]) for row in pq.read_table(path).to_pylist()]
        for path in sorted((run / "trajectories").glob("step_*.parquet"))
    ]
    return lines, (run / "coarse" / "model.safetensors").read_bytes(), samples


def test_each_actor_in_each_phase(calm: Path, folder: Path):
    cells = [(role, event) for role in ROLES for event in EVENTS]
    plan: Plan = {(number, event): [role] for number, (role, event) in enumerate(cells, start=1)}
    stormy, monkey = run(folder, "matrix", plan)
    assert [(role, event) for _, event, role in monkey.killed] == cells
    assert outcome(stormy) == outcome(calm)
    print("\n| role | " + " | ".join(EVENTS) + " |")
    for role in ROLES:
        print(f"| {role} | " + " | ".join("same bytes" for _ in EVENTS) + " |")


@pytest.mark.parametrize("event", EVENTS)
def test_the_driver_in_each_phase(calm: Path, folder: Path, event: str):
    script = (
        "import sys\nfrom c2f_ray import load_recipe, train\nfrom tests.chaos.monkey import Monkey\n"
        f"with Monkey({{(5, {event!r}): ['driver']}} if sys.argv[1] == 'kill' else {{}}).about():\n"
        f"    train(load_recipe({str(CONFIG)!r}, 'run.name=driver_{event}', *{SETTINGS!r}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
    codes = [
        subprocess.run([sys.executable, "-c", script, how], cwd=folder, env=environment).returncode
        for how in ("kill", "go on")
    ]
    assert codes == [-signal.SIGKILL, 0]
    assert outcome(folder / "runs" / f"driver_{event}") == outcome(calm)


def test_a_soak_of_random_kills(calm: Path, folder: Path):
    rng = random.Random(SOAK_SEED)
    plan: Plan = {}
    for step, role in rng.sample([(step, role) for step in range(1, STEPS) for role in ROLES], SOAK_KILLS):
        plan.setdefault((step, rng.choice(EVENTS)), []).append(role)
    stormy, monkey = run(folder, "soak", plan)
    assert len(monkey.killed) == SOAK_KILLS
    assert outcome(stormy) == outcome(calm)
    print(f"\nsoak of seed {SOAK_SEED}: {monkey.killed}")


def test_a_node_is_taken_away(checkout: Callable[[str], Path]):
    """The run goes on with two nodes of three, from which the same bytes come."""
    folder = checkout("node_loss")
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.node_loss"], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    (told,) = [line for line in done.stdout.splitlines() if line.startswith("took away a node with ")]
    assert "RolloutActor" in told
    assert done.returncode == 0
    assert outcome(folder / "runs" / "stormy") == outcome(folder / "runs" / "calm")
