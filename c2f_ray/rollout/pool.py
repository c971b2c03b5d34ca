"""The rollout actors, seen from the driver.

Invariant: the driver holds references to shards and reads only their `TrajectoryInfo`. A shard is the return value of
an actor's call, so the driver owns it and it outlives the actor.
"""

import time
from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Any

import ray

from c2f_ray.data.trajectory import TrajectoryInfo
from c2f_ray.errors import DeadlineError
from c2f_ray.recipe import Recipe
from c2f_ray.rollout.actor import RolloutActor, RolloutRequest
from c2f_ray.rollout.engine import LoadFormat, engine_env
from c2f_ray.waiting import wait_for, wait_for_start


class RolloutPool:
    """Starts `rollout.actors` actors. `prompt_tokens` is a reference to the `Ragged` of all prompts' ids."""

    def __init__(self, recipe: Recipe, prompt_tokens: Any, max_model_tokens: int, load_format: LoadFormat) -> None:
        rollout = recipe.rollout
        gpus = rollout.gpus_per_actor
        options = {
            "num_gpus": gpus,
            "num_cpus": 0 if gpus else 1,
            # Ray would send a small shard inside its reply, into the driver's heap; so it goes to the object store.
            "runtime_env": {"env_vars": {**engine_env(gpus), "RAY_max_direct_call_object_size": "0"}},
        }
        self.timeout_s = rollout.timeout_s
        remote: Any = ray.remote(RolloutActor)
        self.actors = [
            remote.options(**options).remote(recipe.policy, rollout, prompt_tokens, max_model_tokens, load_format)
            for _ in range(rollout.actors)
        ]
        self.started = [actor.ready.remote() for actor in self.actors]
        self.start_timeout_s = recipe.cluster.start_timeout_s
        self.needs = f"{gpus} GPU" if gpus else "1 CPU"

    def wait_until_ready(self) -> None:
        wait_for_start(self.started, self.start_timeout_s, "rollout actors", self.needs)

    def generate(
        self, requests: list[RolloutRequest], max_tokens: int, ordered: bool
    ) -> Iterator[tuple[Any, TrajectoryInfo]]:
        """Yields (reference to Trajectories, its info) as shards finish; see `RolloutActor.generate`.

        Each actor gets consecutive requests. Raises DeadlineError after `rollout.timeout_s`, naming who owes what.
        """
        parts = split(requests, len(self.actors))
        missing = [len(part) for part in parts]
        streams: dict[Any, int] = {
            actor.generate.remote(part, max_tokens, ordered): number
            for number, (actor, part) in enumerate(zip(self.actors, parts, strict=True))
            if part
        }
        deadline = time.monotonic() + self.timeout_s
        shards: dict[int, Any] = {}  # references whose info has not come yet, by actor
        while streams:
            ready, _ = ray.wait(list(streams), timeout=max(0.0, deadline - time.monotonic()), fetch_local=False)
            if not ready:
                owing = [f"rollout actor {i}: {n} of {len(parts[i])} samples" for i, n in enumerate(missing) if n]
                raise DeadlineError(f"after {self.timeout_s:g} s these are missing: {'; '.join(owing)}")
            stream: Any = ready[0]
            number = streams[stream]
            reference = next(stream, None)
            if reference is None:
                del streams[stream]
                if number in shards:  # not a shard: the error that ended the actor's call
                    self._read(shards[number], number, missing[number])
            elif number not in shards:
                shards[number] = reference
            else:
                info = self._read(reference, number, missing[number])
                missing[number] -= len(info)
                yield shards.pop(number), info

    def _read(self, reference: Any, number: int, missing: int) -> TrajectoryInfo:
        return wait_for(reference, self.timeout_s, f"rollout actor {number}, which owes {missing} samples")

    def load_folder(self, folder: str, prompt_tokens: Any) -> None:
        """Every engine takes another model of the same architecture, and a reference to the prompts for it."""
        refs = [actor.load_folder.remote(folder, prompt_tokens) for actor in self.actors]
        wait_for(refs, self.start_timeout_s, f"rollout actors that load {folder}")

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)


def split(requests: list[RolloutRequest], parts: int) -> list[list[RolloutRequest]]:
    """Consecutive parts of about equal size. A prompt's consecutive requests stay together: one prefill serves them."""
    prompts = [list(group) for _, group in groupby(requests, key=lambda request: request.prompt_row)]
    bounds = [len(prompts) * part // parts for part in range(parts + 1)]
    return [[request for prompt in prompts[start:stop] for request in prompt] for start, stop in pairwise(bounds)]
