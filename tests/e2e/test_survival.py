"""Actors that die in the middle of a run: it ends like one in which none died."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

from c2f_ray import driver, load_recipe, train
from c2f_ray.learner.group import LearnerGroup
from c2f_ray.reward.pool import RewardPool
from c2f_ray.rollout.pool import RolloutPool
from c2f_ray.watch.metrics import MetricsLine, read_metrics, without_timing

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the actors cannot import this file

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
SETTINGS = [
    "run.steps=6", "run.deterministic=true", "rollout.actors=2", "prompts.per_step=12", "rollout.shard_samples=4",
    "length.max_tokens=24", "checkpoints.every_steps=2", "weights.timeout_s=20", "reward.workers=2",
]  # fmt: skip
FROM_THE_ENGINE = ("logprob_gap/", "importance/")  # in other company an engine's logprobs have other last bits


def pid_of(actor: Any) -> int:
    return ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))


class MortalRollouts(RolloutPool):
    """Real engines. In step 2 one dies after the first shard, in step 6 all do."""

    steps = 0
    pids: list[int]

    def generate(self, *args: Any) -> Iterator[Any]:
        self.steps += 1
        self.pids = [pid_of(actor) for actor in self.actors]  # later they are busy
        for number, found in enumerate(super().generate(*args)):
            yield found
            if number == 0 and self.steps == 2:
                os.kill(self.pids[0], signal.SIGKILL)
            if number == 0 and self.steps == 6:
                for pid in self.pids:
                    os.kill(pid, signal.SIGKILL)


class MortalRewards(RewardPool):
    """Real workers. One dies before it can score the first shard of step 3."""

    submitted = 0
    dead: Any = None

    def submit(self, shard: Any) -> Any:
        self.submitted += 1
        if self.submitted != 13:  # each step has six shards
            return super().submit(shard)
        pids = {worker: pid_of(worker) for worker in self.workers}
        scoring = super().submit(shard)
        os.kill(pids[scoring.worker], signal.SIGKILL)
        MortalRewards.dead = scoring.worker
        return scoring

    def close(self) -> None:
        assert self.dead not in self.workers
        super().close()


class MortalLearner(LearnerGroup):
    """Real ranks. One dies in its fifth backward pass; and an engine dies while it receives version 3."""

    engines: list[Any]
    generations = 0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        MortalLearner.generations += 1

    def connect(self, actors: list[Any]) -> None:
        self.engines = actors
        super().connect(actors)

    def send_weights(self, version: int) -> None:
        if version == 3 and len(self.engines) == 2:
            ray.get(self.engines[1].__ray_call__.remote(die_while_receiving))
        if version == 4 and MortalLearner.generations == 1:
            ray.get(self.ranks[1].__ray_call__.remote(die_in_the_next_update))
        super().send_weights(version)


def die_while_receiving(actor: Any) -> None:
    actor.llm.update_weights = lambda request: os._exit(1)


def die_in_the_next_update(rank: Any) -> None:
    rank.policy.backward = lambda loss, *, last: os._exit(1)


@pytest.fixture(scope="module")
def runs(cluster: None, world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("survival")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "tiny").symlink_to(world, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(load_recipe(CONFIG, "run.name=calm", *SETTINGS))
        patch.setattr(driver, "RolloutPool", MortalRollouts)
        patch.setattr(driver, "RewardPool", MortalRewards)
        patch.setattr(driver, "LearnerGroup", MortalLearner)
        train(load_recipe(CONFIG, "run.name=stormy", *SETTINGS))
    assert MortalLearner.generations == 2
    return {name: folder / "runs" / name for name in ("calm", "stormy")}


def comparable(line: MetricsLine) -> MetricsLine:
    return {key: value for key, value in without_timing(line).items() if not key.startswith(FROM_THE_ENGINE)}


def test_deaths_leave_no_trace_in_weights_and_metrics(runs: dict[str, Path]):
    lines = {name: [comparable(line) for line in read_metrics(run / "metrics.jsonl")] for name, run in runs.items()}
    assert [line["step"] for line in lines["stormy"]] == [1, 2, 3, 4, 5, 6]
    assert lines["calm"] == lines["stormy"]
    weights = {name: (run / "coarse" / "model.safetensors").read_bytes() for name, run in runs.items()}
    assert weights["calm"] == weights["stormy"]


def test_every_sample_was_made_once_and_with_the_weights_of_its_step(runs: dict[str, Path]):
    for step in range(1, 7):
        rows = {
            name: pq.read_table(run / "trajectories" / f"step_{step:06d}.parquet").to_pylist()
            for name, run in runs.items()
        }
        assert rows["calm"] == rows["stormy"]
        assert [row["sample_id"] for row in rows["stormy"]] == list(range(24))
        assert {row["weight_version"] for row in rows["stormy"]} == {step - 1}
