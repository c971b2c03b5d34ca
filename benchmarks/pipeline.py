"""The driver itself: pipelined against synchronous steps with simulated stage times, and its cost at scale.

    python benchmarks/pipeline.py

Engines, reward workers and learner are fakes that only wait, or answer at once; the driver's loop is the real one.
"""

import json
import os
import platform
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import ray

from c2f_ray import driver, load_recipe, train
from c2f_ray.data.trajectory import TrajectoryInfo
from c2f_ray.reward.rewards import ScoredShard
from c2f_ray.tiny.world import build_world
from c2f_ray.watch.metrics import read_metrics

CONFIG = Path(__file__).parents[1] / "configs" / "tiny.yaml"
RESULTS = Path(__file__).parent / "results" / "pipeline.json"
STEPS = 20
# Seconds of generation and of learning in one step; long-tailed generation differs from step to step.
CASES = {"balanced": (0.2, 0.2), "rollout_heavy": (0.3, 0.1), "long_tailed": (None, 0.2)}
SCALE = {"prompts": 32768, "shard_samples": 32}  # with their greedy rollouts 65,536 samples a step, 2,048 shards
LEARNED = {"critic/loss": 1.0, "learner/loss": 0.0}


def generation_seconds(case: str, step: int) -> float:
    seconds = CASES[case][0]
    return seconds if seconds is not None else float(np.random.default_rng(step).choice([0.1, 0.5], p=[0.8, 0.2]))


class FakeRollouts:
    """Yields whole shards after the time that the case says."""

    case = "balanced"
    shard_samples = 64

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.step = 0
        self.version = 0
        self.serving = [0]

    def wait_until_ready(self) -> None: ...
    def close(self) -> None: ...

    def take_started(self) -> list[Any]:
        return []

    def generate(self, requests: list[Any], *args: Any) -> Iterator[tuple[Any, TrajectoryInfo]]:
        self.step += 1
        if self.case != "at_once":
            time.sleep(generation_seconds(self.case, self.step))
        nothing = ray.put(None)
        for start in range(0, len(requests), self.shard_samples):
            part = requests[start : start + self.shard_samples]
            count = len(part)
            yield (
                nothing,
                TrajectoryInfo(
                    sample_id=np.array([request.sample_id for request in part]),
                    prompt_row=np.array([request.prompt_row for request in part]),
                    greedy=np.array([request.greedy for request in part]),
                    finished=np.ones(count, bool),
                    interrupted=np.zeros(count, bool),
                    prompt_tokens=np.full(count, 20, np.int32),
                    response_tokens=np.full(count, 100, np.int32),
                    weight_version=np.full(count, FakeLearner.version, np.int32),
                ),
            )


class FakeRewards:
    def __init__(self, *args: Any) -> None: ...
    def wait_until_ready(self) -> None: ...
    def close(self) -> None: ...

    def submit(self, shard: Any, tokens: Any, finished: Any) -> int:
        return len(tokens)

    def ready(self, asked: list[int]) -> float:
        return 1.0

    def collect(self, asked: list[int]) -> list[ScoredShard]:
        return [ScoredShard(np.ones(count, np.float32), {}, {}, True) for count in asked]


class FakeLearner:
    """Learns for as long as the case says, beside whatever the driver does."""

    version = 0

    def __init__(self, *args: Any) -> None:
        FakeLearner.version = 0

    def wait_until_ready(self) -> None: ...
    def close(self) -> None: ...
    def connect(self, actors: list[Any]) -> None: ...

    def send_weights(self, version: int) -> None:
        FakeLearner.version = version

    def start_update(self, shards: list[Any], batch: Any) -> float:
        return time.monotonic() + (0.0 if FakeRollouts.case == "at_once" else CASES[FakeRollouts.case][1])

    def finish_update(self, ends: float) -> dict[str, float]:
        time.sleep(max(0.0, ends - time.monotonic()))
        return LEARNED

    def save(self, folder: Path) -> dict[str, str]:
        return {}

    def export(self, folder: Path, template: str) -> None:
        folder.mkdir()


class NotSaved(driver.Training):
    """There are no trajectories to write."""

    def save(self, *args: Any) -> None: ...


def run(*overrides: str) -> list[dict[str, Any]]:
    fakes = {"RolloutPool": FakeRollouts, "Rewards": FakeRewards, "LearnerGroup": FakeLearner, "Training": NotSaved}
    settings = ["length={rule: fixed, max_tokens: 96}", "checkpoints.every_steps=1000", *overrides]
    with patch.multiple(driver, **fakes), patch.object(driver, "training_of", lambda learner: NotSaved):
        return read_metrics(train(load_recipe(CONFIG, *settings), fresh=True) / "metrics.jsonl")


def ideal(case: str) -> float:
    """Seconds of the best schedule for staleness 1: each step's learning beside the next one's generation."""
    rollouts = [generation_seconds(case, step) for step in range(1, STEPS + 1)]
    learning = CASES[case][1]
    return rollouts[0] + sum(max(learning, rollout) for rollout in rollouts[1:]) + learning


def schedules() -> dict[str, Any]:
    found = {}
    for case in CASES:
        FakeRollouts.case, FakeRollouts.shard_samples = case, 64
        took = {}
        for name, staleness in (("synchronous", 0), ("pipelined", 1)):
            lines = run(
                f"run.steps={STEPS}",
                f"rollout.max_staleness={staleness}",
                "learner.importance_clip=2.0",
                f"run.name={case}",
            )
            took[name] = sum(line["time/step_s"] for line in lines)
        found[case] = {
            **{f"{name}_s": seconds for name, seconds in took.items()},
            "ideal_s": ideal(case),
            "ideal_over_pipelined": ideal(case) / took["pipelined"],
            "synchronous_over_pipelined": took["synchronous"] / took["pipelined"],
        }
    return found


def scale() -> dict[str, Any]:
    """The loop's own seconds for each sample, and whether its memory grows from step to step."""
    FakeRollouts.case, FakeRollouts.shard_samples = "at_once", SCALE["shard_samples"]
    prompts = Path("many.jsonl")
    prompts.write_text("".join(f'{{"messages": "a={n % 10},b={n % 7},a?"}}\n' for n in range(SCALE["prompts"])))
    settings = [f"prompts.per_step={SCALE['prompts']}", f"prompts.source={prompts}", "run.steps=6", "run.name=scale"]
    tracemalloc.start()
    peaks: list[int] = []
    original = NotSaved.step

    def step(self: NotSaved, *args: Any) -> dict[str, Any]:
        tracemalloc.reset_peak()
        metrics = original(self, *args)
        peaks.append(tracemalloc.get_traced_memory()[0])
        return metrics

    with patch.object(NotSaved, "step", step):
        run(*settings)
    tracemalloc.stop()
    lines = run(*settings)
    samples = 2 * SCALE["prompts"]
    return {
        "samples_per_step": samples,
        "microseconds_per_sample": statistics.median(1e6 * line["time/step_s"] / samples for line in lines[1:]),
        "kept_mib_after_each_step": [round(peak / 2**20, 1) for peak in peaks],
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        build_world(Path(".cache/tiny"), effort="smoke")
        ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False)
        found = {
            "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
            "schedules": schedules(),
            "scale": scale(),
        }
        ray.shutdown()
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    for case, figures in found["schedules"].items():
        good = figures["ideal_over_pipelined"] >= 0.95
        print(
            f"goal {case}, of the ideal: {figures['ideal_over_pipelined']:.3f} (>= 0.95) {'ok' if good else 'missed'}"
        )
    per_sample = found["scale"]["microseconds_per_sample"]
    print(f"goal driver per sample: {per_sample:.1f} us (<= 50) {'ok' if per_sample <= 50 else 'missed'}")
    kept = found["scale"]["kept_mib_after_each_step"]
    print(f"goal memory flat: {kept} MiB {'ok' if kept[-1] < 1.1 * kept[1] + 1 else 'missed'}")


if __name__ == "__main__":
    main()
