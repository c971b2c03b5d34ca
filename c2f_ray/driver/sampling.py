"""The trajectories of one step: drawn prompts, sampled and scored.

Invariants: every request ends as one trajectory, or waits for the next step with all others of its prompt; a shard is
sent to be scored the moment that it arrives; nothing depends on the order of arrival.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

import numpy as np

from c2f_ray.data.prompts import draw, request_seed
from c2f_ray.data.trajectory import Bool, Float32, Int64, TrajectoryInfo
from c2f_ray.errors import C2FError
from c2f_ray.recipe import Recipe
from c2f_ray.reward.rewards import Rewards, ScoredShard
from c2f_ray.rollout.actor import Begun, RolloutRequest
from c2f_ray.rollout.pool import RolloutPool


@dataclass(frozen=True)
class Carried:
    """A prompt whose samples a step did not wait for; the next one finishes them."""

    row: int
    epoch: int
    begun: dict[int, Begun]  # by number among the prompt's samples; sampled from the start where there is none


@dataclass(frozen=True)
class Rollouts:
    """A step's trajectories, scored: `info` and `rewards` have one entry for each that has a reward, by sample id."""

    step: int
    shards: list[Any]  # references, in order of arrival
    scored: list[ScoredShard]  # of each shard
    info: TrajectoryInfo
    rewards: Float32
    parts: dict[str, float]  # mean of each reward of a sum, over the sampled ones
    limit: int  # of their length, in tokens
    dropped: int  # trajectories without a reward, or without the greedy one to compare it with
    ready: float  # share of the scores that were there when the last rollout was
    left: set[int] = field(default_factory=set)  # sample ids that wait for the next step
    position: int = 0  # prompts drawn since the start of the run, with theirs
    carried: list[Carried] = field(default_factory=list)  # what is left, as the next step takes it


@dataclass(frozen=True)
class Learning:
    """The update that is under way while a step is sampled."""

    is_done: Callable[[], bool]
    finish: Callable[[], None]  # waits for it, and sends the new weights


class Sampler:
    def __init__(
        self,
        recipe: Recipe,
        prompt_ids: list[str],
        groups: list[list[int]],
        greedy: bool,
        rollouts: RolloutPool,
        rewards: Rewards,
        revive: Callable[[], None],
        timed: Callable[[str, int], AbstractContextManager[None]],
    ) -> None:
        """``groups``: rows to train on, see `draw`. ``greedy``: each prompt also gets a greedy rollout. ``revive`` is
        called when no engine is left; ``timed`` opens a stage of a step."""
        self.recipe = recipe
        self.prompt_ids = prompt_ids
        self.groups = groups
        self.greedy = greedy
        self.rollouts = rollouts
        self.rewards = rewards
        self.revive = revive
        self.timed = timed
        self.per_prompt = recipe.rollout.samples_per_prompt + greedy  # requests

    def step(
        self, step: int, position: int, carried: list[Carried], limit: int, last: bool, learning: Learning | None = None
    ) -> Rollouts:
        """The rollouts of a step whose prompts begin at ``position``, and of those that the one before left to it.

        The ``last`` step leaves nothing.
        """
        recipe = self.recipe
        count = recipe.prompts.per_step
        if recipe.run.epochs is not None:
            count = min(count, recipe.run.epochs * sum(map(len, self.groups)) - position)
        new = draw(position, count, self.groups, recipe.run.seed, recipe.prompts.shuffle)
        drawn = [(prompt.row, prompt.epoch) for prompt in carried] + new
        requests = self.requests(drawn)
        for number, prompt in enumerate(carried):
            for sample, begun in prompt.begun.items():
                index = number * self.per_prompt + sample
                requests[index] = replace(requests[index], begun=begun)
        leave = None if last or recipe.rollout.wait_for == 1 else len(carried)
        arrived = _Arrived(requests, self.per_prompt, recipe.rollout.wait_for, leave)
        rollouts = self._sample(step, arrived, limit, learning)
        left = [Carried(*drawn[number], begun) for number, begun in arrived.left().items()]
        return replace(rollouts, position=position + count, carried=left)

    def sample(self, step: int, drawn: list[tuple[int, int]], limit: int) -> Rollouts:
        """The rollouts of prompts given as (row, epoch)."""
        return self._sample(step, _Arrived(self.requests(drawn), self.per_prompt), limit, None)

    def requests(self, drawn: list[tuple[int, int]]) -> list[RolloutRequest]:
        """The requests for prompts given as (row, epoch), which the sampling seeds are made of.

        Each prompt's samples and, after them, its greedy rollout where ReMax wants one.
        """
        samples = self.recipe.rollout.samples_per_prompt
        return [
            RolloutRequest(
                sample_id=prompt * self.per_prompt + sample,
                prompt_row=row,
                seed=request_seed(self.recipe.run.seed, self.prompt_ids[row], epoch, sample),
                greedy=sample == samples,
            )
            for prompt, (row, epoch) in enumerate(drawn)
            for sample in range(self.per_prompt)
        ]

    def prompt_number(self, info: TrajectoryInfo) -> Int64:
        """[N] Of each trajectory's prompt among those of the step; a row may be drawn twice."""
        return info.sample_id // self.per_prompt

    def _sample(self, step: int, arrived: "_Arrived", limit: int, learning: Learning | None) -> Rollouts:
        """Generates and scores.

        With `rollout.in_flight: continue` the weights that ``learning`` ends with are sent as soon as they are there,
        and samples under way go on with them.
        """
        ordered, ready = self.recipe.run.deterministic, 1.0
        renew = learning is not None and self.recipe.rollout.in_flight == "continue"

        def stop() -> bool:
            return (renew or arrived.enough()) and (learning is None or learning.is_done())

        watch = stop if renew or arrived.may_leave else None
        missing = arrived.requests
        while missing:
            asked = []
            while missing:
                with self.timed("rollout", step):
                    for shard, info in self.rollouts.generate(missing, limit, ordered, self.revive, watch):
                        if arrived.add(shard, info):
                            tokens = info.prompt_tokens + info.response_tokens
                            asked.append(self.rewards.submit(shard, tokens, info.finished))
                if learning is not None and renew and arrived.begun:
                    learning.finish()
                    renew, learning = False, None
                missing = [] if arrived.enough() else arrived.take_begun()
            with self.timed("reward", step):
                ready = min(ready, self.rewards.ready(asked))
                missing = arrived.score(self.rewards.collect(asked))
        return self._rollouts(step, arrived, limit, ready)

    def _rollouts(self, step: int, arrived: "_Arrived", limit: int, ready: float) -> Rollouts:
        """By sample id: arrival is timing, and not even the last bit of a mean may depend on it."""
        info = TrajectoryInfo.concat(arrived.infos)
        asked = [request.sample_id for request in arrived.requests]
        if sorted([*info.sample_id.tolist(), *arrived.begun]) != asked:
            raise C2FError(f"asked for {len(asked)} samples and got {len(info)}, or some of them twice")
        order = np.argsort(info.sample_id)
        left = arrived.left()
        prompt = self.prompt_number(info)
        order = order[~np.isin(prompt[order], list(left))]
        scored = arrived.scored
        rewards = np.concatenate([shard.rewards for shard in scored])
        good = order[with_reward(info, prompt, rewards, self.greedy)[order]]
        sampled = good[~info.greedy[good]]
        return Rollouts(
            step=step,
            shards=arrived.shards,
            scored=scored,
            info=info.select(good),
            rewards=rewards[good],
            parts={
                name: float(np.concatenate([shard.parts[name] for shard in scored])[sampled].mean())
                for name in scored[0].parts
            },
            limit=limit,
            dropped=len(order) - len(good),
            ready=ready,
            left={number * self.per_prompt + sample for number, begun in left.items() for sample in begun},
        )


class _Arrived:
    """What has come of a step's requests: whole trajectories in shards, and interrupted ones."""

    def __init__(
        self, requests: list[RolloutRequest], per_prompt: int, wait_for: float = 1.0, leave: int | None = None
    ) -> None:
        """``leave``: prompts are left to the next step once ``wait_for`` of all are done, these first ones among them;
        None: none is left."""
        self.requests = requests
        self.shards: list[Any] = []  # references
        self.infos: list[TrajectoryInfo] = []  # of each shard
        self.scored: list[ScoredShard] = []  # of each shard, after `score`
        self.begun: dict[int, Begun] = {}  # by sample id: interrupted
        self.per_prompt = per_prompt
        self.owed = np.full(len(requests) // per_prompt, per_prompt)  # samples of each prompt
        self.undone = len(self.owed)  # prompts
        self.most_undone = self.undone - ceil(wait_for * self.undone)
        self.must = leave or 0
        self.may_leave = leave is not None

    def add(self, shard: Any, info: TrajectoryInfo) -> bool:
        """Whether its trajectories are whole."""
        if info.interrupted.any():
            self.begun |= {sample_id: Begun(shard, row) for row, sample_id in enumerate(info.sample_id.tolist())}
            return False
        self.shards.append(shard)
        self.infos.append(info)
        self._owe(info.sample_id // self.per_prompt, -1)
        return True

    def _owe(self, prompts: Int64, change: int) -> None:
        """Costs as much as a shard has rows: at scale a step has thousands of shards, and of prompts."""
        touched = np.unique(prompts)
        done_before = int((self.owed[touched] == 0).sum())
        np.add.at(self.owed, prompts, change)
        self.undone += done_before - int((self.owed[touched] == 0).sum())

    def enough(self) -> bool:
        return self.may_leave and self.undone <= self.most_undone and not self.owed[: self.must].any()

    def take_begun(self) -> list[RolloutRequest]:
        """Requests for the rest of what was interrupted."""
        begun, self.begun = self.begun, {}
        return [replace(each, begun=begun[each.sample_id]) for each in self.requests if each.sample_id in begun]

    def score(self, scored: list[ScoredShard]) -> list[RolloutRequest]:
        """Of the shards that came since the last call. Requests for what was lost with a node before it had scores."""
        self.scored += scored
        lost = {number for number, shard in enumerate(self.scored) if shard.lost}
        if not lost:
            return []
        ids = {sample_id for number in lost for sample_id in self.infos[number].sample_id.tolist()}
        for number in lost:
            self._owe(self.infos[number].sample_id // self.per_prompt, 1)
        self.shards = [shard for number, shard in enumerate(self.shards) if number not in lost]
        self.infos = [info for number, info in enumerate(self.infos) if number not in lost]
        self.scored = [shard for shard in self.scored if not shard.lost]
        return [request for request in self.requests if request.sample_id in ids]

    def left(self) -> dict[int, dict[int, Begun]]:
        """Of the prompts with an interrupted sample all samples, which are learned from together: by number of the
        prompt, and among its samples."""
        left: dict[int, dict[int, Begun]] = {sample_id // self.per_prompt: {} for sample_id in self.begun}
        if not left:
            return left
        done = {
            sample_id: Begun(shard, row)
            for shard, info in zip(self.shards, self.infos, strict=True)
            for row, sample_id in enumerate(info.sample_id.tolist())
            if sample_id // self.per_prompt in left
        }
        for sample_id, where in (self.begun | done).items():
            number, sample = divmod(sample_id, self.per_prompt)
            left[number][sample] = where
        return left


def with_reward(info: TrajectoryInfo, prompt: Int64, rewards: Float32, greedy_rollouts: bool) -> Bool:
    """Which trajectories [N] have a reward and, where there are greedy rollouts, one to compare it with."""
    good = np.isfinite(rewards)
    if greedy_rollouts:
        sampled = np.unique(prompt[good & ~info.greedy])
        greedy = np.unique(prompt[good & info.greedy])
        good &= np.isin(prompt, np.intersect1d(sampled, greedy))
    return good
