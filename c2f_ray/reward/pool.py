"""Reward workers: each scores whole shards, as soon as they arrive."""

from typing import Any

import numpy as np
import ray

from c2f_ray.data.prompts import Messages
from c2f_ray.data.tokenizer import decode, load_tokenizer
from c2f_ray.data.trajectory import Float32, Trajectories
from c2f_ray.recipe.schema import Cluster, UltraRMReward
from c2f_ray.reward.ultrarm import UltraRMScorer
from c2f_ray.waiting import wait_for, wait_for_start


class RewardWorker:
    """Turns tokens back into text with the policy's tokenizer, and scores them with the reward model's own."""

    def __init__(self, reward: UltraRMReward, policy_tokenizer: str, messages: list[Messages]) -> None:
        self.tokenizer = load_tokenizer(policy_tokenizer)
        self.messages = messages
        self.scorer = UltraRMScorer(reward)

    def ready(self) -> bool:
        return True

    def score(self, shard: Trajectories) -> Float32:
        """One reward for each trajectory, float32 [N]."""
        return self.scorer.score(
            [
                (
                    self.messages[shard.info.prompt_row[i]],
                    decode(self.tokenizer, shard.response[i], special=False),
                    bool(shard.info.finished[i]),
                )
                for i in range(len(shard))
            ]
        )


class RewardPool:
    """The workers. A shard goes to the worker with the fewest shards waiting."""

    def __init__(self, reward: UltraRMReward, cluster: Cluster, policy_tokenizer: str, messages: Any) -> None:
        self.timeout_s = reward.timeout_s
        self.workers: list[Any] = [
            ray.remote(RewardWorker)
            .options(num_gpus=reward.gpus_per_worker, num_cpus=0 if reward.gpus_per_worker else 1)
            .remote(reward, policy_tokenizer, messages)
            for _ in range(reward.workers)
        ]
        self.waiting: list[list[Any]] = [[] for _ in self.workers]
        self.started = [worker.ready.remote() for worker in self.workers]
        self.start_timeout_s = cluster.start_timeout_s
        self.needs = f"{reward.gpus_per_worker} GPU" if reward.gpus_per_worker else "1 CPU"

    def wait_until_ready(self) -> None:
        wait_for_start(self.started, self.start_timeout_s, "reward workers", self.needs)

    def submit(self, shard: Any) -> Any:
        """Sends a reference to a shard to a worker; returns a reference to its rewards, float32 [N]."""
        for refs in self.waiting:
            done, _ = ray.wait(refs, num_returns=len(refs), timeout=0) if refs else ([], [])
            refs[:] = [ref for ref in refs if ref not in done]
        worker = int(np.argmin([len(refs) for refs in self.waiting]))
        rewards = self.workers[worker].score.remote(shard)
        self.waiting[worker].append(rewards)
        return rewards

    def collect(self, rewards: list[Any]) -> list[Float32]:
        return wait_for(rewards, self.timeout_s, f"rewards of {len(rewards)} shards from {len(self.workers)} workers")

    def close(self) -> None:
        for worker in self.workers:
            ray.kill(worker)
