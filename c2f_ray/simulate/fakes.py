"""Actors that only wait: the real driver, pools and learner group run on them, at any scale, on any machine.

A few Ray processes play all actors of a role. Each actor is a light handle with the interface of Ray's own; its calls
are real ones, whose results are real references and streams, and as long as Ray's calls take. Only the actors are
fakes. Invariants: an actor is at one call at a time; a sample carries the version of the weights that were sent last.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray

from c2f_ray.data.trajectory import Ragged, Trajectories, TrajectoryInfo
from c2f_ray.learner.batching import UpdateBatch
from c2f_ray.learner.rank import LearnerRank
from c2f_ray.recipe.roles import Scorer
from c2f_ray.reward.worker import RewardWorker
from c2f_ray.rollout.actor import RolloutActor, RolloutRequest
from c2f_ray.runtime.placement import Placement


@dataclass(frozen=True)
class FakeWork:
    """What the actors do: seconds to wait, and the size of what they return."""

    samples: tuple[float, ...]  # of an actor, for each sample of its n-th call; after the last the first comes again
    scores: list[tuple[Scorer, float]]  # of a worker with this scorer, for each row
    update: float
    transfer: float
    response_tokens: int = 0  # of each response in its shard; its length, as the shard's info has it, is the limit


@dataclass(frozen=True)
class FakeActors(Placement):
    """In place of a run's placement. ``processes`` play the actors of a role; `close` ends them."""

    work: FakeWork = field(kw_only=True)
    processes: int = 1
    hosts: dict[str, list[Any]] = field(default_factory=dict)  # by role

    def start(self, role: str, number: int, actor: type, options: dict[str, Any], *args: Any) -> "FakeHandle":
        """Of Ray's options the environment alone matters to a fake: it says how results travel."""
        if role not in self.hosts:
            remote: Any = ray.remote(FAKES[actor])
            host = remote.options(num_cpus=0, max_concurrency=10_000, runtime_env=options["runtime_env"])
            self.hosts[role] = [host.remote(self.work) for _ in range(self.processes)]
        handle = FakeHandle(self.hosts[role][number % self.processes], number)
        handle.begin.remote(*args)
        return handle

    def kill(self, actor: "FakeHandle") -> None:
        """Its process plays others, too."""

    def close(self) -> None:
        for host in (host for hosts in self.hosts.values() for host in hosts):
            ray.kill(host)


@dataclass(frozen=True)
class FakeHandle:
    host: Any
    number: int

    def __getattr__(self, method: str) -> "FakeMethod":
        if method.startswith("_"):
            raise AttributeError(method)
        return FakeMethod(getattr(self.host, method), self.number)


@dataclass(frozen=True)
class FakeMethod:
    method: Any
    number: int

    def remote(self, *args: Any) -> Any:
        return self.method.remote(self.number, *args)


class FakeRolloutActors:
    """Responses are finished evenly over the time of a call, which nothing interrupts."""

    def __init__(self, work: FakeWork) -> None:
        self.work = work
        self.version = 0
        self.shard_samples = 0
        self.calls: defaultdict[int, int] = defaultdict(int)
        self.free_at: defaultdict[int, float] = defaultdict(float)

    async def begin(self, number: int, policy: Any, rollout: Any, *_: Any) -> None:
        self.shard_samples = rollout.shard_samples

    async def ready(self, number: int) -> str:
        return f"fake rollout actor {number}"

    async def interrupt(self, number: int, call: int) -> None:
        """Nothing to do."""

    async def take_version(self, number: int, version: int) -> None:
        self.version = version

    async def generate(
        self, number: int, requests: list[RolloutRequest], max_tokens: int, ordered: bool, call: int | None
    ) -> AsyncIterator[Trajectories | TrajectoryInfo]:
        of_call = self.work.samples
        seconds = of_call[self.calls[number] % len(of_call)]
        self.calls[number] += 1
        began = max(time.monotonic(), self.free_at[number])
        self.free_at[number] = began + seconds * len(requests)
        version = self.version
        for start in range(0, len(requests), self.shard_samples):
            part = requests[start : start + self.shard_samples]
            await _sleep_until(began + seconds * (start + len(part)))
            shard = self._shard(part, max_tokens, version)
            yield shard
            yield shard.info

    def _shard(self, requests: list[RolloutRequest], max_tokens: int, version: int) -> Trajectories:
        count, length = len(requests), self.work.response_tokens
        info = TrajectoryInfo(
            sample_id=np.array([request.sample_id for request in requests], np.int64),
            prompt_row=np.array([request.prompt_row for request in requests], np.int64),
            greedy=np.array([request.greedy for request in requests], np.bool_),
            finished=np.ones(count, np.bool_),
            interrupted=np.zeros(count, np.bool_),
            prompt_tokens=np.ones(count, np.int32),
            response_tokens=np.full(count, max_tokens, np.int32),
            weight_version=np.full(count, version, np.int32),
        )
        prompt = Ragged(np.zeros(count, np.int32), np.arange(count + 1))
        offsets = np.arange(count + 1) * length
        response = Ragged(np.zeros(count * length, np.int32), offsets)
        versions = Ragged(np.full(count * length, version, np.int32), offsets)
        return Trajectories(info, prompt, response, Ragged(np.zeros(count * length, np.float32), offsets), versions)


class FakeRewardWorkers:
    """A score is the version of the weights that sampled, so that each round of a run is better than the last. A log
    ratio's reference gives 0, or the two would cancel.
    """

    def __init__(self, work: FakeWork) -> None:
        self.scores = work.scores
        self.seconds, self.sign = 0.0, 1.0
        self.free_at: defaultdict[int, float] = defaultdict(float)

    async def begin(self, number: int, scorer: Scorer, *_: Any) -> None:
        self.seconds = next(seconds for known, seconds in self.scores if known == scorer)
        self.sign = max(scorer.sign, 0.0)

    async def ready(self, number: int) -> bool:
        return True

    async def score(self, number: int, shard: Trajectories, rows: list[int]) -> tuple[Any, dict[int, str]]:
        began = max(time.monotonic(), self.free_at[number])
        self.free_at[number] = began + self.seconds * len(rows)
        await _sleep_until(self.free_at[number])
        return self.sign * shard.info.weight_version[rows], {}


class FakeLearnerRanks:
    """Every rank takes as long as all."""

    def __init__(self, work: FakeWork) -> None:
        self.work = work
        self.engines: list[FakeHandle] = []

    async def begin(self, number: int, *_: Any) -> None: ...
    async def rendezvous(self, number: int) -> None: ...
    async def start(self, number: int, meeting: None) -> None: ...
    async def load(self, number: int, folder: Path) -> None: ...
    async def export(self, number: int, folder: Path, chat_template: str) -> None: ...

    async def connect(self, number: int, actors: list[FakeHandle]) -> None:
        self.engines = list({actor.host: actor for actor in actors}.values())  # one of each process

    async def send_weights(self, number: int, version: int) -> None:
        await asyncio.sleep(self.work.transfer)
        if number == 0:
            await asyncio.gather(*(engine.take_version.remote(version) for engine in self.engines))

    async def update(self, number: int, shards: list[Any], batch: UpdateBatch) -> dict[str, float]:
        await asyncio.sleep(self.work.update)
        return {"critic/loss": 0.0}

    async def save(self, number: int, folder: Path) -> dict[str, str]:
        return {}


FAKES: dict[type, type] = {
    RolloutActor: FakeRolloutActors,
    RewardWorker: FakeRewardWorkers,
    LearnerRank: FakeLearnerRanks,
}


async def _sleep_until(moment: float) -> None:
    await asyncio.sleep(max(0.0, moment - time.monotonic()))
