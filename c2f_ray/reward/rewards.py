"""A recipe's reward: one, or a weighted sum of several, each with workers of its own."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from c2f_ray.data.trajectory import Bool, Float32, Int64
from c2f_ray.recipe import Cluster, Reward
from c2f_ray.recipe.roles import scorers_of
from c2f_ray.reward.pool import RewardPool, Scoring
from c2f_ray.reward.worker import Float64
from c2f_ray.runtime.placement import ANYWHERE, Placement
from c2f_ray.runtime.trace import Timeline
from c2f_ray.runtime.watchdog import Busy


@dataclass(frozen=True)
class ScoredShard:
    """Rewards [N] of a shard's trajectories, NaN where there is none; ``causes`` tells why, by row."""

    rewards: Float32
    parts: dict[str, Float64]  # each reward of a sum, unweighted, by name; a log ratio's models
    causes: dict[int, str]
    drop: bool  # the recipe goes on without them
    lost: bool = False  # the shard is gone, with its node

    def columns(self) -> dict[str, list[float]]:
        """For the files of trajectories."""
        parts = {f"reward_{name}": values.tolist() for name, values in self.parts.items()}
        return {"reward": self.rewards.tolist(), **parts}


@dataclass(frozen=True)
class _Asked:
    finished: Bool  # [N]
    scorings: list[list[Scoring]]  # by reward and scorer


class Rewards:
    def __init__(
        self,
        reward: Reward,
        cluster: Cluster,
        policy_tokenizer: str,
        prompts: Any,
        ordered: bool = False,
        timeline: Timeline | None = None,
        placement: Placement = ANYWHERE,
    ) -> None:
        """``prompts`` refers to the PromptSet that shards name rows of; ``ordered``: what is computed together does
        not depend on time."""
        self.parts = reward.named_parts()
        # All start before any is waited for.
        self.pools: dict[str, list[tuple[str, float, RewardPool]]] = {
            name: [
                (
                    scorer.label,
                    scorer.sign,
                    RewardPool(scorer.label, scorer, cluster, policy_tokenizer, prompts, ordered, timeline, placement),
                )
                for scorer in part
            ]
            for name, part in scorers_of(reward).items()
        }

    def _all(self) -> list[RewardPool]:
        return [pool for pools in self.pools.values() for _, _, pool in pools]

    def wait_until_ready(self) -> None:
        for pool in self._all():
            pool.wait_until_ready()

    def submit(self, shard: Any, tokens: Int64, finished: Bool) -> _Asked:
        """Sends a reference to Trajectories, or to a list of Sample, to be scored."""
        return _Asked(finished, [[p.submit(shard, tokens) for _, _, p in pools] for pools in self.pools.values()])

    def ready(self, asked: list[_Asked]) -> float:
        """The share of their scores that are known by now."""
        known = [
            pool.known([shard.scorings[number][position] for shard in asked])
            for number, pools in enumerate(self.pools.values())
            for position, (_, _, pool) in enumerate(pools)
        ]
        return sum(known) / (sum(len(shard.finished) for shard in asked) * len(self._all()))

    def collect(self, asked: list[_Asked]) -> list[ScoredShard]:
        """The rewards of each shard."""
        for number, pools in enumerate(self.pools.values()):
            for position, (_, _, pool) in enumerate(pools):
                pool.collect([shard.scorings[number][position] for shard in asked])
        return [self._combine(shard) for shard in asked]

    def _combine(self, asked: _Asked) -> ScoredShard:
        total = np.zeros(len(asked.finished))
        parts: dict[str, Float64] = {}
        causes: dict[int, str] = {}
        drop = True
        for (name, part), pools, scorings in zip(self.parts.items(), self.pools.values(), asked.scorings, strict=True):
            value = np.zeros(len(total))
            for (label, sign, _), scoring in zip(pools, scorings, strict=True):
                value += sign * scoring.scores
                if len(pools) > 1:
                    parts[label] = scoring.scores
                causes |= {row: f"reward {label}: {cause}" for row, cause in scoring.causes.items()}
            if any(scoring.causes for scoring in scorings):
                drop = drop and part.reward.on_failure == "drop"
            value -= part.reward.truncation_penalty * ~asked.finished
            if len(self.parts) > 1:
                parts[name] = value
            total += part.weight * value
        lost = any(scoring.lost for scorings in asked.scorings for scoring in scorings)
        return ScoredShard(total.astype(np.float32), parts, causes, drop, lost)

    def busy(self) -> list[Busy]:
        return [busy for pool in self._all() for busy in pool.busy()]

    def close(self) -> None:
        for pool in self._all():
            pool.close()
