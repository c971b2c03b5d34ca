"""The learner's ranks, seen from the driver as one learner.

Invariant: a call ends when all ranks have answered, or with the first rank's error, or at its deadline with the names
of the ranks that did not answer.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from c2f_ray.data.trajectory import Float32
from c2f_ray.errors import ActorDiedError, C2FError, LearnerLostError
from c2f_ray.learner.batching import UpdateBatch
from c2f_ray.learner.rank import LearnerRank
from c2f_ray.recipe import Recipe
from c2f_ray.runtime.placement import ANYWHERE, Placement
from c2f_ray.runtime.threads import thread_env
from c2f_ray.runtime.waiting import wait_for_start
from c2f_ray.runtime.watchdog import Busy

NEWS_OF_DEATH_S = 30.0  # how long Ray may take to learn that a node is gone


@dataclass(frozen=True)
class Asked:
    """A call that all ranks were told to begin."""

    method: str
    refs: list[ObjectRef]
    asked_at: float  # of time.monotonic
    deadline: float


class LearnerGroup:
    """``learner.ranks`` actors, one DeepSpeed job together."""

    def __init__(
        self,
        recipe: Recipe,
        algorithm: Callable[[Recipe, int, int], Any],
        total_updates: int,
        placement: Placement = ANYWHERE,
    ) -> None:
        """Tells the ranks to start. ``algorithm`` is the class that each rank makes an instance of; ``total_updates``
        of the whole run, for the learning-rate schedule.
        """
        self.recipe = recipe
        gpus = recipe.learner.gpus_per_rank
        # The second is what cuBLAS needs to be deterministic, where the recipe asks for that.
        environment = {"DS_ACCELERATOR": "cuda" if gpus else "cpu", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        if gpus == 0:
            working = recipe.learner.ranks + recipe.pipelined * recipe.rollout.actors
            environment |= thread_env(recipe.learner.threads, working)
        options = {"num_gpus": gpus, "num_cpus": 0 if gpus else 1, "runtime_env": {"env_vars": environment}}
        self.placement = placement
        self.ranks: list[Any] = [
            placement.start("learner", rank, LearnerRank, options, recipe, algorithm, rank, total_updates)
            for rank in range(recipe.learner.ranks)
        ]
        meeting = self.ranks[0].rendezvous.remote()  # handed on as a reference: nothing waits here
        self.started = [rank.start.remote(meeting) for rank in self.ranks]
        now = time.monotonic()
        self.asked = Asked("start", self.started, now, now + recipe.cluster.start_timeout_s)  # last

    def wait_until_ready(self) -> None:
        needs = f"{self.recipe.learner.gpus_per_rank} GPU" if self.recipe.learner.gpus_per_rank else "1 CPU"
        try:
            wait_for_start(self.started, self.recipe.cluster.start_timeout_s, "learner ranks", needs)
        except ActorDiedError as error:  # as a rank does that was sent to a node of whose loss Ray did not know yet
            raise LearnerLostError(str(error)) from error
        except RayTaskError as error:
            self._blame_a_death("start", self.started, error)
            raise

    def connect(self, actors: list[Any]) -> None:
        """Joins the rollout actors, before the first ``send_weights``."""
        self._all("connect", actors)

    def send_weights(self, version: int) -> None:
        self._all("send_weights", version)

    def start_update(self, shards: list[ObjectRef], batch: UpdateBatch) -> "Asked":
        """One update on one step's shards of Trajectories, which go to the ranks as references."""
        return self._ask("update", shards, ray.put(batch))

    def finish_update(self, asked: "Asked") -> dict[str, float]:
        """The metrics of an update that was started."""
        return self._answers(asked)[0]

    def update(self, shards: list[ObjectRef], batch: UpdateBatch) -> dict[str, float]:
        return self.finish_update(self.start_update(shards, batch))

    def logprobs(self, shards: list[ObjectRef]) -> dict[int, Float32]:
        """The policy's logprobs of the response tokens of all sampled trajectories, by sample id."""
        found: dict[int, Float32] = {}
        for part in self._all("logprobs", shards):
            found |= part
        return found

    def save(self, folder: Path) -> dict[str, str]:
        """Writes the learner's share of a checkpoint into a folder; returns the files' SHA-256 hex digests by name."""
        return {name: digest for digests in self._all("save", folder.absolute()) for name, digest in digests.items()}

    def load(self, folder: Path) -> None:
        """Goes on from what ``save`` wrote, by however many ranks."""
        self._all("load", folder.absolute())

    def export(self, folder: Path, chat_template: str) -> None:
        """Writes an ordinary Hugging Face folder, on rank 0's node; complete, or not there."""
        self._all("export", folder.absolute(), chat_template)

    def busy(self) -> list[Busy]:
        asked = self.asked
        silent_s, timeout_s = time.monotonic() - asked.asked_at, asked.deadline - asked.asked_at
        return [
            Busy(f"learner rank {rank}", f"it is at {asked.method}", silent_s, timeout_s)
            for rank in _silent(asked.refs)
        ]

    def close(self) -> None:
        for rank in self.ranks:
            self.placement.kill(rank)

    def _all(self, method: str, *args: Any) -> list[Any]:
        return self._answers(self._ask(method, *args))

    def _ask(self, method: str, *args: Any) -> "Asked":
        refs = [getattr(rank, method).remote(*args) for rank in self.ranks]
        now = time.monotonic()
        self.asked = Asked(method, refs, now, now + self.recipe.learner.timeout_s)
        return self.asked

    def _answers(self, asked: "Asked") -> list[Any]:
        method, refs, timeout_s = asked.method, asked.refs, self.recipe.learner.timeout_s
        try:
            return ray.get(refs, timeout=max(1.0, asked.deadline - time.monotonic()))
        except RayTaskError as error:
            self._blame_a_death(method, refs, error)
            raise
        except RayActorError as error:
            raise LearnerLostError(f"learner {method}: a rank died: {error}") from error
        except GetTimeoutError:
            silent = [str(rank) for rank in _silent(refs)]
            raise LearnerLostError(
                f"learner {method}: no answer from rank {', '.join(silent)} of {len(refs)} after {timeout_s:g} s"
            ) from None

    def _blame_a_death(self, method: str, refs: list[ObjectRef], error: RayTaskError) -> None:
        """A rank whose peer died fails in their process group, often before Ray tells of the death."""
        if not isinstance(error, C2FError) and (died := self._deaths(refs)):
            raise LearnerLostError(f"learner {method}: a rank died: {died[0]}") from error

    def _deaths(self, refs: list[ObjectRef]) -> list[RayActorError]:
        """What Ray says of the ranks that are gone, once each has answered, or is known to be, or takes too long."""
        died = []
        for ref in ray.wait(refs, num_returns=len(refs), timeout=NEWS_OF_DEATH_S)[0]:
            try:
                ray.get(ref)
            except RayActorError as error:
                died.append(error)
            except Exception:  # the other ranks' complaints of it
                continue
        return died


def _silent(refs: list[ObjectRef]) -> list[int]:
    """Ranks that have not answered."""
    answered, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
    return [rank for rank, ref in enumerate(refs) if ref not in answered]
