"""One way into Ray: the session that there is, the cluster that the environment names, or a new local one."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from c2f_ray.adapters.ray import address_of_this_node, loopback_only
from c2f_ray.errors import RecipeError
from c2f_ray.recipe import Recipe
from c2f_ray.recipe.roles import Needs, Role, needs_of
from c2f_ray.runtime.signals import Stopping

PROBE_S = 5.0
SPARE_CPUS = 2  # for tasks, such as merging


@contextmanager
def ray_session(recipe: Recipe, roles: list[Role], address: str | None = None) -> Iterator[None]:
    """Joins or starts Ray, and ends what it started. A local Ray, which cannot grow, is refused if it is too small.

    `address` as in RAY_ADDRESS, whose value it is when not given.
    """
    needs = needs_of(roles)
    started = not ray.is_initialized()
    local = False
    if started:
        local = _connect(address or os.environ.get("RAY_ADDRESS"), max(os.cpu_count() or 1, needs.cpus + SPARE_CPUS))
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if local:
            check_resources(needs, nodes[0])
        if len(nodes) > 1 and not Path(recipe.run.folder).is_absolute():
            raise RecipeError(
                f"run.folder: {recipe.run.folder}: the cluster has {len(nodes)} nodes, each with its own working "
                "directory; give the absolute path of a folder that all of them see"
            )
        with Stopping():  # Ray has put a handler of its own in place of ours
            yield
    finally:
        if started:
            ray.shutdown()


def unreachable(address: str) -> str | None:
    """Why nothing answers at `address`; `auto` is the cluster that this node's files and processes name.

    Ray itself would wait for minutes for a cluster that is gone, and whose name was left behind. Raises ConnectionError
    where `auto` names none.
    """
    if address == "auto":
        address = address_of_this_node()
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    try:
        if colon:
            socket.create_connection((host, int(port)), PROBE_S).close()
    except (OSError, ValueError) as error:
        return f"nothing answers at {address}: {error}"
    return None


def _connect(address: str | None, cpus: int) -> bool:
    """The cluster at `address`, or that of this node; where there is none (or `address` is `local`), a new one: True.

    A new one offers as many CPUs as the actors reserve: on a laptop they share the cores. It listens on loopback alone,
    as do the process groups of its actors.
    """
    if address != "local":
        try:
            found = address or "auto"
            if not (problem := unreachable(found)):
                ray.init(address=found, log_to_driver=False, logging_level=logging.ERROR)
                return False
            if address:
                raise ConnectionError(problem)
            print(f"the cluster that was started here is gone ({problem}); a new one starts", flush=True)
        except (ConnectionError, ValueError) as error:
            if address:
                raise RecipeError(f"RAY_ADDRESS: {address}: no cluster answers there: {error}") from None
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    settings = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    with loopback_only():
        ray.init(address="local", num_cpus=cpus, **settings)
    return True


def check_resources(needs: Needs, machine: dict[str, Any]) -> None:
    """Refuses a job that asks for more than the machine has, on which it would run alone."""
    for name, amount in (("GPU", needs.gpus), ("CPU", needs.cpus)):
        if amount > machine.get(name, 0):
            raise RecipeError(
                f"the recipe asks for {amount:g} {name}, and this machine has {machine.get(name, 0):g}; lower "
                "rollout.actors, reward.workers or learner.ranks (or what each takes), or join a cluster: RAY_ADDRESS"
            )
