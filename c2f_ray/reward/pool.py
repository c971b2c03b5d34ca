"""The workers of one scorer, seen from the driver.

Invariants: a shard goes to the worker with the fewest tokens waiting; what a worker could not score is asked of another
until its attempts are used up; no row is without a score and without a cause at the end; a row is to blame for the loss
of a worker only if the worker had nothing else to do.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from c2f_ray.adapters.vllm import engine_env
from c2f_ray.data.trajectory import Int64
from c2f_ray.errors import ActorDiedError
from c2f_ray.recipe import Cluster, ModelReward
from c2f_ray.recipe.roles import Scorer
from c2f_ray.reward.worker import Float64, RewardWorker
from c2f_ray.runtime.placement import Placement
from c2f_ray.runtime.threads import thread_env
from c2f_ray.runtime.trace import Timeline
from c2f_ray.runtime.waiting import wait_for_start
from c2f_ray.runtime.watchdog import Busy

CALLS_AT_ONCE = 16  # of a worker with a model: their conversations share batches


@dataclass
class Scoring:
    """A shard on its way: the scores so far, NaN where there is none yet, and why some never come."""

    shard: Any
    tokens: Int64  # [N] of each row
    scores: Float64  # [N]
    causes: dict[int, str] = field(default_factory=dict)  # by row
    lost: bool = False  # the shard is gone

    @property
    def unknown(self) -> int:
        """Rows that have neither a score nor a cause."""
        return int(np.isnan(self.scores).sum()) - len(self.causes)


@dataclass
class _Call:
    scoring: Scoring
    rows: list[int]
    attempts: int  # made before this one
    worker: "_Worker"
    alone: bool = False
    tokens: int = 0

    def __post_init__(self) -> None:
        self.tokens = int(self.scoring.tokens[self.rows].sum())


@dataclass(eq=False)
class _Worker:
    actor: Any
    started: Any  # reference to what `ready` returns
    calls: dict[Any, _Call] = field(default_factory=dict)  # by reference to their result, oldest first
    heard_at: float = 0.0  # its last answer, or the call that ended its idleness
    is_ready: bool = False
    tokens: int = 0  # of its calls

    def answered(self, ref: Any) -> _Call:
        call = self.calls.pop(ref)
        self.tokens -= call.tokens
        return call


class RewardPool:
    def __init__(
        self,
        label: str,
        scorer: Scorer,
        cluster: Cluster,
        policy_tokenizer: str,
        prompts: Any,
        ordered: bool,
        timeline: Timeline | None,
        placement: Placement,
    ) -> None:
        """``prompts`` refers to the PromptSet that the shards' rows are of; ``ordered``: no batches across shards."""
        self.label = label
        self.timeline = timeline
        reward, gpus = scorer.reward, scorer.gpus
        self.name = "reward workers" + (f" of {scorer.model}" if scorer.model else "")
        self.timeout_s = reward.timeout_s
        self.attempts = reward.attempts
        self.start_timeout_s = cluster.start_timeout_s
        self.restarts_left = cluster.max_restarts  # of workers that die before they are ready
        self.needs = f"{gpus} GPU" if gpus else "1 CPU"
        self.calls_at_once = CALLS_AT_ONCE if reward.model_signs else 1
        self.suspects: list[tuple[Scoring, int]] = []  # rows that may have cost workers; each is asked alone, once
        environment = engine_env(gpus) if reward.generates else {}
        if isinstance(reward, ModelReward) and gpus == 0:
            environment |= thread_env(reward.threads, reward.workers)
        options = {
            "num_gpus": gpus,
            "num_cpus": 0 if gpus else 1,
            "max_concurrency": self.calls_at_once,
            "runtime_env": {"env_vars": environment},
        }
        self.placement = placement
        arguments = (scorer, policy_tokenizer, prompts, ordered)
        self.new_actor = lambda number: placement.start(f"reward {label}", number, RewardWorker, options, *arguments)
        self.workers = [self._start(number) for number in range(reward.workers)]

    def _start(self, number: int) -> _Worker:
        actor = self.new_actor(number)
        return _Worker(actor, actor.ready.remote())

    def wait_until_ready(self) -> None:
        wait_for_start([worker.started for worker in self.workers], self.start_timeout_s, self.name, self.needs)

    def submit(self, shard: Any, tokens: Int64) -> Scoring:
        """Sends a reference to a shard whose rows have so many ``tokens`` to a worker."""
        scoring = Scoring(shard, tokens, np.full(len(tokens), np.nan))
        self._take_answers([next(iter(worker.calls)) for worker in self.workers if worker.calls], 0.0)
        self._call(scoring, list(range(len(tokens))), 0, None)
        return scoring

    def known(self, scorings: list[Scoring]) -> int:
        """How many of their rows have a score or a cause by now."""
        self._take_answers(self._asked(), 0.0)
        return sum(len(scoring.scores) - scoring.unknown for scoring in scorings)

    def _asked(self) -> list[Any]:
        return [ref for worker in self.workers for ref in worker.calls]

    def collect(self, scorings: list[Scoring]) -> None:
        """Returns when each row of these has a score or a cause."""
        self._take_answers(self._asked(), 0.0)
        left = list(scorings)
        while left:
            if not left[-1].unknown:
                left.pop()
                continue
            self._ask_suspects(left)
            busy = [worker for worker in self.workers if worker.calls]
            deadline = min(self._deadline(worker) for worker in busy)
            self._take_answers(self._asked(), max(0.0, deadline - time.monotonic()))
            # Of those that are there now: an answer may have told that one died, and it was replaced.
            for worker in list(self.workers):
                if worker.calls and self._deadline(worker) <= time.monotonic():
                    self._replace(worker, f"it gave no answer for {self.timeout_s:g} s")

    def _deadline(self, worker: _Worker) -> float:
        return worker.heard_at + self.timeout_s + (0 if self._is_ready(worker) else self.start_timeout_s)

    def _is_ready(self, worker: _Worker) -> bool:
        if not worker.is_ready and ray.wait([worker.started], timeout=0)[0]:
            worker.is_ready, worker.heard_at = True, time.monotonic()  # its start does not count as silence
        return worker.is_ready

    def _call(self, scoring: Scoring, rows: list[int], attempts: int, before: _Worker | None) -> None:
        ready = [worker for worker in self.workers if self._is_ready(worker)] or self.workers
        others = [worker for worker in ready if worker is not before] or ready
        worker = min(others, key=lambda worker: worker.tokens)
        self._send(worker, _Call(scoring, rows, attempts, worker))

    def _send(self, worker: _Worker, call: _Call) -> None:
        if not worker.calls:
            worker.heard_at = time.monotonic()
        ref = worker.actor.score.remote(call.scoring.shard, call.rows)
        worker.calls[ref] = call
        worker.tokens += call.tokens
        if self.timeline is not None:
            row = f"reward {self.label} {self.workers.index(worker)}"
            self.timeline.follow(ref, row, f"{len(call.rows)} samples")

    def _ask_suspects(self, scorings: list[Scoring]) -> None:
        """One of each worker, once nothing else is on its way; nothing else is sent before these are answered."""
        if not all(call.alone for worker in self.workers for call in worker.calls.values()):
            return
        idle = [worker for worker in self.workers if not worker.calls]
        wanted = [suspect for suspect in self.suspects if any(suspect[0] is scoring for scoring in scorings)]
        for worker, (scoring, row) in zip(idle, wanted, strict=False):
            self.suspects = [other for other in self.suspects if other[0] is not scoring or other[1] != row]
            self._send(worker, _Call(scoring, [row], self.attempts - 1, worker, alone=True))

    def _take_answers(self, refs: list[Any], timeout_s: float) -> None:
        """Those of these calls that have come; waits for the first of them."""
        if not refs:
            return
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        if not done and timeout_s > 0:
            done, _ = ray.wait(refs, num_returns=1, timeout=timeout_s)
        for ref in done:
            worker = next((worker for worker in self.workers if ref in worker.calls), None)
            if worker is None:  # lost with an earlier one of these
                continue
            try:
                scores, causes = ray.get(ref)
            except (RayActorError, ObjectLostError) as error:
                if isinstance(error, RayActorError) and not isinstance(error, RayTaskError):
                    self._replace(worker, f"it died: {error}")
                    continue
                # Not the worker's own death, but that of the actor whose shard it was to read.
                call = worker.answered(ref)
                call.scoring.lost = True
                call.scoring.causes |= dict.fromkeys(call.rows, "its shard was lost with a node")
                continue
            call = worker.answered(ref)
            worker.heard_at, worker.is_ready = time.monotonic(), True
            call.scoring.scores[call.rows] = scores
            self._failed(call, causes)

    def _failed(self, call: _Call, causes: dict[int, str]) -> None:
        attempts = call.attempts + 1
        if causes and attempts < self.attempts:
            self._call(call.scoring, sorted(causes), attempts, call.worker)
        else:
            call.scoring.causes |= {row: f"attempt {attempts}: {cause}" for row, cause in causes.items()}

    def _replace(self, worker: _Worker, why: str) -> None:
        """Another actor takes the place of one that is lost. It was at its oldest calls; the others only waited."""
        self.placement.kill(worker.actor)  # one that hangs still has its GPUs
        if not self._is_ready(worker):
            if self.restarts_left == 0:
                raise ActorDiedError(f"{self.name}: one was lost before it was ready: {why}")
            self.restarts_left -= 1
        if self.timeline is not None:
            self.timeline.note(f"a reward worker of {self.label} is replaced: {why}")
        place = self.workers.index(worker)
        new = self.workers[place] = self._start(place)
        for number, call in enumerate(worker.calls.values()):
            if number < self.calls_at_once and worker.is_ready:
                self._lost(call, new, why)
            else:
                self._call(call.scoring, call.rows, call.attempts, new)

    def _lost(self, call: _Call, new: _Worker, why: str) -> None:
        attempts = call.attempts + 1
        if call.alone:
            call.scoring.causes[call.rows[0]] = f"attempt {attempts}: the worker that scored it was lost: {why}"
        elif attempts < self.attempts - 1:
            self._call(call.scoring, call.rows, attempts, new)
        else:
            self.suspects += [(call.scoring, row) for row in call.rows]

    def busy(self) -> list[Busy]:
        now = time.monotonic()
        return [
            Busy(
                f"reward worker {number} of {self.label}",
                f"it has {sum(len(call.rows) for call in list(worker.calls.values()))} rows to score",
                now - worker.heard_at,
                self.timeout_s + (0 if worker.is_ready else self.start_timeout_s),
            )
            for number, worker in enumerate(self.workers)
            if worker.calls
        ]

    def close(self) -> None:
        for worker in self.workers:
            self.placement.kill(worker.actor)
