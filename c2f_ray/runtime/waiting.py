"""Every wait has a deadline, and names what it waited for."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from c2f_ray.errors import ActorDiedError, DeadlineError


def wait_for(refs: Any, timeout_s: float, what: str) -> Any:
    """`ray.get` with a deadline. Raises DeadlineError saying that `what` gave no answer in `timeout_s` seconds."""
    try:
        return ray.get(refs, timeout=timeout_s)
    except GetTimeoutError:
        raise DeadlineError(f"{what}: no answer after {timeout_s:g} s") from None
    except RayActorError as error:
        raise ActorDiedError(f"{what}: an actor died: {error}") from error


def wait_for_start(refs: list[Any], timeout_s: float, what: str, needs: str) -> Any:
    """Waits for new actors. The error says what they need and what the cluster has free."""
    try:
        return ray.get(refs, timeout=timeout_s)
    except RayActorError as error:
        raise ActorDiedError(f"{what}: one could not start: {error}") from error
    except GetTimeoutError:
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        free = {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
        raise DeadlineError(
            f"{what}: {len(refs) - len(ready)} of {len(refs)} did not start in {timeout_s:g} s; "
            f"each needs {needs}, and the cluster has {free or 'nothing'} free"
        ) from None


def in_turn(
    starts: Mapping[str, Callable[[], Any]], at_once: int, timeout_s: float, what: str
) -> Iterator[tuple[str, Any]]:
    """Runs one task for each name, `at_once` of them at a time, and yields names and results as they are finished.

    Raises DeadlineError, naming `what` and who, when none is finished in `timeout_s` seconds.
    """
    waiting, running = dict(starts), dict[Any, str]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name = next(iter(waiting))
                running[waiting.pop(name)()] = name
            done, _ = ray.wait(list(running), timeout=timeout_s)
            if not done:
                raise DeadlineError(f"{what} {', '.join(running.values())}: not finished after {timeout_s:g} s")
            name = running.pop(done[0])
            yield name, wait_for(done[0], timeout_s, f"{what} {name}")
    finally:
        for ref in running:
            ray.cancel(ref, force=True)
