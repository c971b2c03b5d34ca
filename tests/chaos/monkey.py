"""Kills the processes of a run's actors at events: real engines, workers and ranks, and real signals.

A plan says at which event of which step an actor of which role dies; a step that is done again counts again. Events:
`generation` (a shard has come), `scoring` (a shard was sent to be scored), `learning`, `transfer` and `checkpointing`
(the ranks were told to begin).
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from c2f_ray.driver import training as driver
from c2f_ray.learner.group import Asked, LearnerGroup
from c2f_ray.reward import rewards
from c2f_ray.reward.pool import RewardPool, Scoring
from c2f_ray.rollout.pool import RolloutPool

ROLES = ("rollout", "reward", "learner")
EVENTS = ("generation", "scoring", "learning", "transfer", "checkpointing")
Plan = dict[tuple[int, str], list[str]]  # (step, event) to the roles of which one dies


class Monkey:
    def __init__(self, plan: Plan, hang: Plan | None = None) -> None:
        """Kills as ``plan`` says, and stops as ``hang`` says: such a process neither ends nor answers."""
        self.plan = plan
        self.hang = hang or {}
        self.step = 0
        self.killed: list[tuple[int, str, str]] = []
        self.pids: dict[str, list[int]] = {}

    def note_pids(self, role: str, actors: list[Any]) -> None:
        """Of those alive, before they are busy: of the death of an idle one the run knows nothing yet."""
        pids = []
        for answer in [actor.__ray_call__.remote(_pid) for actor in actors]:
            with suppress(RayActorError):
                pids.append(ray.get(answer, timeout=120))
        self.pids[role] = pids

    def happens(self, event: str) -> None:
        for plan, sent in ((self.plan, signal.SIGKILL), (self.hang, signal.SIGSTOP)):
            for role in plan.pop((self.step, event), []):
                self.killed.append((self.step, event, role))
                os.kill(os.getpid() if role == "driver" else self.pids[role][-1], sent)

    @contextmanager
    def about(self) -> Iterator[None]:
        """Every run in this context has the monkey about."""
        monkey = self

        class WatchedRollouts(RolloutPool):
            def generate(self, *args: Any) -> Iterator[Any]:
                monkey.step += 1
                monkey.note_pids("rollout", [self.actors[number] for number in self.serving])
                for found in super().generate(*args):
                    monkey.happens("generation")
                    yield found

        class WatchedRewards(RewardPool):
            def wait_until_ready(self) -> None:
                super().wait_until_ready()
                monkey.note_pids("reward", [worker.actor for worker in self.workers])

            def submit(self, *args: Any) -> Scoring:
                if not any(worker.calls for worker in self.workers):
                    monkey.note_pids("reward", [worker.actor for worker in self.workers])
                scoring = super().submit(*args)
                monkey.happens("scoring")
                return scoring

        class WatchedLearner(LearnerGroup):
            def wait_until_ready(self) -> None:
                super().wait_until_ready()
                monkey.note_pids("learner", self.ranks)

            def _ask(self, method: str, *args: Any) -> Asked:
                asked = super()._ask(method, *args)
                event = {"update": "learning", "send_weights": "transfer", "save": "checkpointing"}.get(method)
                if event:
                    monkey.happens(event)
                return asked

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(driver, "RolloutPool", WatchedRollouts)
            patch.setattr(rewards, "RewardPool", WatchedRewards)
            patch.setattr(driver, "LearnerGroup", WatchedLearner)
            yield


def _pid(actor: Any) -> int:
    return os.getpid()
