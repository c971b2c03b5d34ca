"""Reward workers: each scores whole shards, as soon as they arrive."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError

from c2f_ray.data.prompts import PromptSet
from c2f_ray.data.tokenizer import decode, load_tokenizer
from c2f_ray.data.trajectory import Float32, Trajectories
from c2f_ray.errors import ActorDiedError, DeadlineError
from c2f_ray.recipe.schema import Cluster, FunctionReward, UltraRMReward
from c2f_ray.reward.function import FunctionScorer, Sample
from c2f_ray.reward.ultrarm import UltraRMScorer
from c2f_ray.waiting import wait_for_start


class RewardWorker:
    """Turns tokens back into text with the policy's tokenizer; a reward model reads it with its own."""

    def __init__(self, reward: UltraRMReward | FunctionReward, policy_tokenizer: str, prompts: PromptSet) -> None:
        self.tokenizer = load_tokenizer(policy_tokenizer)
        self.prompts = prompts
        self.scorer = FunctionScorer(reward) if isinstance(reward, FunctionReward) else UltraRMScorer(reward)

    def ready(self) -> bool:
        return True

    def score(self, shard: Trajectories) -> Float32:
        """One reward for each trajectory, float32 [N]."""
        return self.scorer.score(
            [
                Sample(
                    messages=self.prompts.messages[row],
                    response=decode(self.tokenizer, shard.response[i], special=False),
                    finished=bool(shard.info.finished[i]),
                    record=self.prompts.records[row],
                )
                for i, row in enumerate(shard.info.prompt_row.tolist())
            ]
        )


@dataclass
class Scoring:
    """A shard on its way through a worker."""

    shard: Any
    worker: Any
    rewards: Any  # reference to float32 [N]


class RewardPool:
    """The workers. A shard goes to the worker with the fewest shards waiting; a dead worker is replaced."""

    def __init__(
        self, reward: UltraRMReward | FunctionReward, cluster: Cluster, policy_tokenizer: str, prompts: Any
    ) -> None:
        """``prompts`` refers to the PromptSet that the shards' rows are of."""
        self.timeout_s = reward.timeout_s
        gpus = 0 if isinstance(reward, FunctionReward) else reward.gpus_per_worker
        remote: Any = ray.remote(RewardWorker).options(num_gpus=gpus, num_cpus=0 if gpus else 1)
        self.new_worker = lambda: remote.remote(reward, policy_tokenizer, prompts)
        self.workers: list[Any] = [self.new_worker() for _ in range(reward.workers)]
        self.waiting: list[list[Any]] = [[] for _ in self.workers]
        self.started = [worker.ready.remote() for worker in self.workers]
        self.start_timeout_s = cluster.start_timeout_s
        self.restarts_left = cluster.max_restarts
        self.needs = f"{gpus} GPU" if gpus else "1 CPU"

    def wait_until_ready(self) -> None:
        wait_for_start(self.started, self.start_timeout_s, "reward workers", self.needs)

    def submit(self, shard: Any) -> Scoring:
        """Sends a reference to a shard to a worker."""
        for refs in self.waiting:
            done, _ = ray.wait(refs, num_returns=len(refs), timeout=0) if refs else ([], [])
            refs[:] = [ref for ref in refs if ref not in done]
        number = int(np.argmin([len(refs) for refs in self.waiting]))
        worker = self.workers[number]
        scoring = Scoring(shard, worker, worker.score.remote(shard))
        self.waiting[number].append(scoring.rewards)
        return scoring

    def collect(self, scorings: list[Scoring]) -> list[Float32]:
        """The rewards of each shard, float32 [N]; what a dead or silent worker owed is scored by others.

        Raises what a worker raised; ActorDiedError or DeadlineError when `cluster.max_restarts` is used up.
        """
        deadline = time.monotonic() + self.timeout_s
        pending = list(scorings)
        found: dict[int, Float32] = {}
        while pending:
            refs = [scoring.rewards for scoring in pending]
            done, _ = ray.wait(refs, timeout=max(0.0, deadline - time.monotonic()))
            lost: dict[Any, Exception] = {}  # by worker
            if not done:
                what = f"rewards of {len(pending)} of {len(scorings)} shards from {len(self.workers)} workers"
                silent = DeadlineError(f"{what}: no answer after {self.timeout_s:g} s")
                lost = {scoring.worker: silent for scoring in pending}
            for scoring in [scoring for scoring in pending if scoring.rewards in done]:
                try:
                    found[id(scoring)] = ray.get(scoring.rewards)
                    pending.remove(scoring)
                except RayActorError as error:
                    lost[scoring.worker] = ActorDiedError(f"a reward worker died: {error}")
            for worker, error in lost.items():
                self._replace(worker, error)
                deadline = time.monotonic() + self.timeout_s + self.start_timeout_s
            for scoring in [scoring for scoring in pending if scoring.worker in lost]:
                again = self.submit(scoring.shard)
                scoring.worker, scoring.rewards = again.worker, again.rewards
        return [found[id(scoring)] for scoring in scorings]

    def _replace(self, worker: Any, cause: Exception) -> None:
        if self.restarts_left == 0:
            raise cause
        self.restarts_left -= 1
        ray.kill(worker)  # one that hangs still has its GPUs
        number = self.workers.index(worker)
        self.workers[number] = self.new_worker()
        self.waiting[number] = []

    def close(self) -> None:
        for worker in self.workers:
            ray.kill(worker)
