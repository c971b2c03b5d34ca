"""The rollout actors, seen from the driver.

Invariants: the driver holds references to shards and reads only their `TrajectoryInfo`; a shard is the return value of
an actor's call, so the driver owns it and it outlives the actor; a dead actor is replaced, its replacement serves
nothing before a transfer has brought it weights, and only what the dead one still owed is asked for again.
"""

import time
from collections.abc import Callable, Iterator
from itertools import count, pairwise
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from c2f_ray.adapters.vllm import engine_env
from c2f_ray.data.trajectory import TrajectoryInfo
from c2f_ray.errors import ActorDiedError, DeadlineError
from c2f_ray.recipe import Recipe
from c2f_ray.rollout.actor import CONCURRENCY_GROUPS, LoadFormat, RolloutActor, RolloutRequest
from c2f_ray.runtime.placement import ANYWHERE, Placement
from c2f_ray.runtime.threads import thread_env
from c2f_ray.runtime.trace import Timeline
from c2f_ray.runtime.waiting import wait_for, wait_for_start
from c2f_ray.runtime.watchdog import Busy

LOOK_EVERY_S = 0.2  # seconds between two questions whether to stop
PING_S = 60.0  # for an idle actor to answer
GATHER_S = 2e-4  # for each stream: to look at it takes Ray about 4 microseconds


class RolloutPool:
    """Starts `rollout.actors` actors. `prompt_tokens` is a reference to the `Ragged` of all prompts' ids."""

    def __init__(
        self,
        recipe: Recipe,
        prompt_tokens: Any,
        max_model_tokens: int,
        load_format: LoadFormat,
        timeline: Timeline | None = None,
        placement: Placement = ANYWHERE,
    ) -> None:
        rollout = recipe.rollout
        self.timeline = timeline
        gpus = rollout.gpus_per_actor
        threads = {} if gpus else thread_env(rollout.threads, rollout.actors + recipe.pipelined * recipe.learner.ranks)
        options = {
            "num_gpus": gpus,
            "num_cpus": 0 if gpus else 1,
            "concurrency_groups": CONCURRENCY_GROUPS,
            # Ray would send a small shard inside its reply, into the driver's heap; so it goes to the object store.
            "runtime_env": {
                "env_vars": {**engine_env(gpus), **threads, "RAY_max_direct_call_object_size": "0"},
            },
        }
        self.timeout_s = rollout.timeout_s
        self.start_timeout_s = recipe.cluster.start_timeout_s
        self.needs = f"{gpus} GPU" if gpus else "1 CPU"
        self.restarts_left = recipe.cluster.max_restarts
        self.is_up = False  # every actor was ready once
        self.placement = placement
        arguments = (recipe.policy, rollout, prompt_tokens, max_model_tokens, load_format)
        self.new_actor = lambda number: placement.start("rollout", number, RolloutActor, options, *arguments)
        self.actors = [self.new_actor(number) for number in range(rollout.actors)]
        self.starting = {number: actor.ready.remote() for number, actor in enumerate(self.actors)}
        self.started_at = dict.fromkeys(self.starting, time.perf_counter())  # of those
        self.streams: dict[Any, _Stream] = {}  # calls of `generate` that go on
        self.calls = count(1)

    def wait_until_ready(self) -> None:
        """All actors, replacements too, have built their engines. Only a replacement that dies is replaced again."""
        while self.starting:
            refs = self.starting
            try:
                wait_for_start(list(refs.values()), self.start_timeout_s, "rollout actors", self.needs)
                self.starting, self.started_at = {}, {}
            except (ActorDiedError, RayTaskError) as error:
                if not self.is_up and isinstance(error, RayTaskError):
                    raise ActorDiedError(f"rollout actors: one could not build its engine: {error}") from error
                if not self.is_up:
                    raise
                for number in [number for number, ref in refs.items() if _failed(ref)]:
                    self.replace(number, error)
        self.is_up = True

    @property
    def serving(self) -> list[int]:
        """Numbers of the actors that are no replacements still on their way."""
        return [number for number in range(len(self.actors)) if number not in self.starting]

    def replace(self, number: int, cause: object) -> None:
        """Starts another actor in the place of a dead one. Raises ActorDiedError when that was done too often."""
        if self.restarts_left == 0:
            raise ActorDiedError(f"rollout actor {number} died, and cluster.max_restarts is used up: {cause}")
        self.restarts_left -= 1
        if self.timeline is not None:
            self.timeline.note(f"rollout actor {number} is replaced: {cause}")
        self.placement.kill(self.actors[number])  # one that hangs still has its GPUs
        self.actors[number] = self.new_actor(number)
        self.starting[number] = self.actors[number].ready.remote()
        self.started_at[number] = time.perf_counter()

    def take_started(self) -> list[Any]:
        """The actors that have built their engines, replacements among them; waits where there is none."""
        if self.starting:
            refs = list(self.starting.values())
            done, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
            failed = [number for number, ref in self.starting.items() if ref in done and _failed(ref)]
            self.starting = {number: ref for number, ref in self.starting.items() if ref not in done}
            self.started_at = {number: self.started_at[number] for number in self.starting}
            for number in failed:
                self.replace(number, "it could not start")
        if not self.serving:
            self.wait_until_ready()
        return [self.actors[number] for number in self.serving]

    def replace_dead(self) -> list[int]:
        """Replaces the actors that do not answer, now that none has work; returns their numbers."""
        answers = {number: self.actors[number].ready.remote() for number in self.serving}
        dead: list[int] = []
        for number, answer in answers.items():
            try:
                ray.get(answer, timeout=PING_S)
            except (RayActorError, GetTimeoutError) as error:
                self.replace(number, error)
                dead.append(number)
        return dead

    def generate(
        self,
        requests: list[RolloutRequest],
        max_tokens: int,
        ordered: bool,
        revive: Callable[[], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Iterator[tuple[Any, TrajectoryInfo]]:
        """Yields (reference to Trajectories, its info) as shards finish; see `RolloutActor.generate`.

        Each actor gets consecutive requests. What one owed when it died goes to another; with `ordered` that leaves
        the composition of every shard as it was. `revive` is called when none is left, and brings replacements their
        weights; without it the death is raised. Raises DeadlineError after `rollout.timeout_s`, naming who owes what.
        Once `stop` returns True, unfinished samples are interrupted and yielded as they are.
        """
        call = next(self.calls) if stop else None
        stopped = False
        deadline = time.monotonic() + self.timeout_s
        ready: list[Any] = []  # streams that have something to read
        owed: list[list[RolloutRequest]] = split(requests, len(self.actors))  # not yet given to an actor
        streams = self.streams = {}
        try:
            while self.streams or any(owed):
                if any(owed) and not self.serving:
                    assert revive is not None
                    began = time.monotonic()
                    revive()
                    deadline += time.monotonic() - began
                for part in filter(None, owed):
                    actor = self._hand_out(part, max_tokens, ordered, call)
                    if stopped:  # what was lost after the interruption
                        actor.interrupt.remote(call)
                owed = []
                left_s = max(0.0, deadline - time.monotonic())
                if stop and not stopped:
                    if stopped := stop():
                        for number in {stream.number for stream in self.streams.values()}:
                            self.actors[number].interrupt.remote(call)
                    left_s = min(left_s, LOOK_EVERY_S)
                ready = [key for key in ready if key in self.streams] or _with_something(self.streams, left_s)
                if ready:
                    key = ready.pop()
                    try:
                        if (found := self._take(key)) is not None:
                            yield found
                    except ActorDiedError as error:
                        if revive is None:
                            raise
                        owed = self._give_up(self.streams[key].number, error)
                elif time.monotonic() >= deadline:
                    silent = self._silent()
                    if revive is None:
                        raise silent
                    for number in {stream.number for stream in self.streams.values()}:
                        owed += self._give_up(number, silent)
                    deadline = time.monotonic() + self.timeout_s
        finally:
            streams.clear()  # not those of a later call, where this one is given up late

    def _hand_out(self, part: list[RolloutRequest], max_tokens: int, ordered: bool, call: int | None) -> Any:
        """Sends requests to the actor with the fewest outstanding samples; returns the actor."""
        load = dict.fromkeys(self.serving, 0)
        for stream in self.streams.values():
            load[stream.number] += len(stream.missing)
        number = min(load, key=lambda number: load[number])
        stream = _Stream(number, {request.sample_id: request for request in part})
        actor = self.actors[number]
        self.streams[actor.generate.remote(part, max_tokens, ordered, call)] = stream
        return actor

    def _take(self, key: Any) -> tuple[Any, TrajectoryInfo] | None:
        """What a stream that has something gives; its end ends it. Every second thing completes a shard."""
        stream = self.streams[key]
        reference = next(key, None)
        if reference is None:
            if stream.shard is not None:  # not a shard: the error that ended the actor's call
                self._read(stream.shard, stream)
            del self.streams[key]
            return None
        if stream.shard is None:
            stream.shard = reference
            return None
        info = self._read(reference, stream)
        for sample_id in info.sample_id.tolist():
            del stream.missing[sample_id]
        shard, stream.shard = stream.shard, None
        if self.timeline is not None:
            self.timeline.add(f"rollout {stream.number}", f"{len(info)} samples", stream.heard_at)
        stream.heard_at = time.perf_counter()
        return shard, info

    def _silent(self) -> DeadlineError:
        owing = [f"{stream}: {len(stream.missing)} of {stream.asked} samples" for stream in self.streams.values()]
        return DeadlineError(f"after {self.timeout_s:g} s these are missing: {'; '.join(owing)}")

    def busy(self) -> list[Busy]:
        now = time.perf_counter()
        starting = [
            Busy(f"rollout actor {number}", "it starts", now - at, self.start_timeout_s)
            for number, at in list(self.started_at.items())
        ]
        return starting + [
            Busy(
                str(stream),
                f"it owes {len(stream.missing)} of {stream.asked} samples",
                now - stream.heard_at,
                self.timeout_s,
            )
            for stream in list(self.streams.values())
        ]

    def _give_up(self, number: int, cause: object) -> list[list[RolloutRequest]]:
        """Replaces an actor; returns what each of its calls owed."""
        self.replace(number, cause)
        lost = [key for key, stream in self.streams.items() if stream.number == number]
        return [list(self.streams.pop(key).missing.values()) for key in lost]

    def _read(self, reference: Any, stream: "_Stream") -> TrajectoryInfo:
        what = f"{stream}, which owes {len(stream.missing)} samples"
        try:
            return wait_for(reference, self.timeout_s, what)
        except ObjectLostError as error:
            raise ActorDiedError(f"{what}: its node is gone: {error}") from error

    def load_folder(self, folder: str, prompt_tokens: Any) -> None:
        """Every engine takes another model of the same architecture, and a reference to the prompts for it."""
        refs = [actor.load_folder.remote(folder, prompt_tokens) for actor in self.actors]
        wait_for(refs, self.start_timeout_s, f"rollout actors that load {folder}")

    def close(self) -> None:
        for actor in self.actors:
            self.placement.kill(actor)


def _failed(ref: Any) -> bool:
    """Returns True if an actor died, or failed to build its engine, before it was ready."""
    try:
        ray.get(ref, timeout=0)
    except (RayActorError, RayTaskError):
        return True
    except GetTimeoutError:
        return False
    return False


def _with_something(streams: dict[Any, "_Stream"], timeout_s: float) -> list[Any]:
    """The streams that have something to read; waits for the first of them."""
    keys = list(streams)
    ready, _ = ray.wait(keys, num_returns=len(keys), timeout=min(timeout_s, GATHER_S * len(keys)), fetch_local=False)
    return ready or ray.wait(keys, timeout=timeout_s, fetch_local=False)[0]


class _Stream:
    """One call of an actor's `generate`."""

    def __init__(self, number: int, missing: dict[int, RolloutRequest]) -> None:
        self.number = number  # of the actor
        self.missing = missing  # requests whose samples have not come, by sample id
        self.asked = len(missing)
        self.heard_at = time.perf_counter()  # its last shard's arrival, or the call
        self.shard: Any = None  # a reference whose info has not come yet

    def __str__(self) -> str:
        return f"rollout actor {self.number}"


def split(requests: list[RolloutRequest], parts: int) -> list[list[RolloutRequest]]:
    """Consecutive parts of about equal size. A prompt's consecutive requests stay together: one prefill serves them."""
    rows = [request.prompt_row for request in requests]
    starts = [0, *(place for place, (row, after) in enumerate(pairwise(rows), 1) if row != after), len(rows)]
    bounds = [starts[(len(starts) - 1) * part // parts] for part in range(parts + 1)]
    return [requests[start:stop] for start, stop in pairwise(bounds)]
