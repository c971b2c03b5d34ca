"""Where a run's actors go, and how they start and end: one placement group, with a bundle for each actor.

Invariants: the group is whole or is not there, so two runs never hold half of a cluster each; an engine's GPUs are of
one node; an actor's replacement takes its bundle, which moves to another node when its own is lost.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from c2f_ray.adapters.ray import available_resources_per_node
from c2f_ray.errors import DeadlineError
from c2f_ray.recipe import Cluster
from c2f_ray.recipe.roles import Role

SAY_EVERY_S = 30.0


@dataclass(frozen=True)
class Placement:
    """Without a group, actors go wherever Ray finds room."""

    group: PlacementGroup | None = None
    first: dict[str, int] = field(default_factory=dict)  # bundle of a role's first actor

    def start(self, role: str, number: int, actor: type, options: dict[str, Any], *args: Any) -> Any:
        """Starts an actor in the bundle of a role's n-th; ``options`` are those of `ray.remote`."""
        remote: Any = ray.remote(**options, **self.options(role, number))(actor)
        return remote.remote(*args)

    def kill(self, actor: Any) -> None:
        ray.kill(actor)

    def options(self, role: str, number: int) -> dict[str, Any]:
        """Ray's options for an actor of a role."""
        if self.group is None:
            return {}
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, self.first[role] + number)}


ANYWHERE = Placement()


@contextmanager
def reserved(roles: list[Role], cluster: Cluster) -> Iterator[Placement]:
    """Reserves room for all roles' actors, as ``cluster.placement`` says, until the context ends.

    While the cluster has too little it says every 30 s who waits for what; an autoscaler sees the demand. Raises
    DeadlineError, which says the same, after ``cluster.start_timeout_s``.
    """
    bundles = [role.bundle for role in roles for _ in range(role.count)]
    first = {role.name: sum(other.count for other in roles[:index]) for index, role in enumerate(roles)}
    group = placement_group(bundles, strategy=cluster.placement)
    ready = group.ready()
    began = time.monotonic()
    try:
        while True:
            left_s = began + cluster.start_timeout_s - time.monotonic()
            if ray.wait([ready], timeout=max(0.0, min(SAY_EVERY_S, left_s)))[0]:
                break
            waiting = f"room for {'; '.join(map(str, roles))}; the cluster has {_free()}"
            if left_s <= SAY_EVERY_S:
                raise DeadlineError(f"no room after {cluster.start_timeout_s:g} s: waited for {waiting}")
            print(f"after {time.monotonic() - began:.0f} s still waiting for {waiting}", flush=True)
        yield Placement(group, first)
    finally:
        remove_placement_group(group)


def _free() -> str:
    """Describes the free GPUs and CPUs of each node."""
    free = available_resources_per_node()
    nodes = [
        ", ".join(
            f"{free.get(node['NodeID'], {}).get(name, 0):g} of {node['Resources'][name]:g} {name}"
            for name in ("GPU", "CPU")
            if name in node["Resources"]
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return f"free: {'; '.join(f'node {number}: {room}' for number, room in enumerate(nodes))}"
