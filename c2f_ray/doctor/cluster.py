"""The checks of the Ray cluster, and those of a node on each of its nodes."""

import logging
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from tempfile import NamedTemporaryFile
from threading import Timer
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from c2f_ray.doctor.broadcast import open_store_here, take_part
from c2f_ray.doctor.node import Finding, check_node, failure, ok, warning
from c2f_ray.plan.clusters import Node, actors_of, place
from c2f_ray.recipe import Recipe
from c2f_ray.runtime.session import unreachable

GUARD_S = 90.0  # for a client to start and be refused
TIMEOUT_S = 300.0


def diagnose(recipe: Recipe | None, *, all_nodes: bool) -> Iterator[tuple[str, Iterable[Finding]]]:
    """(where, findings), as they are found: those of one place must be read before the next place is asked for."""
    yield "this machine", check_node(recipe)
    started = not ray.is_initialized()
    yield "Ray", _ray(recipe, all_nodes)
    if all_nodes and ray.is_initialized():
        yield from each_node(recipe)
    if started and ray.is_initialized():
        ray.shutdown()


def _ray(recipe: Recipe | None, all_nodes: bool) -> Iterator[Finding]:
    yield from token()
    yield from connect()
    if ray.is_initialized():
        yield from guard(ray.get_runtime_context().gcs_address)
        yield from resources(recipe)
    elif all_nodes:
        yield failure("Ray: no cluster was joined, whose nodes could be checked", "run this on its head")


def token() -> Iterator[Finding]:
    """Whether the cluster asks for a token, and whether only its owner can read it. The token itself is not read."""
    mode = os.environ.get("RAY_AUTH_MODE")
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    if mode not in (None, "token"):
        yield failure(
            f"Ray's token: RAY_AUTH_MODE={mode}: who reaches the cluster's ports can run code there",
            "unset it or set it to token, on every node",
        )
    elif os.environ.get("RAY_AUTH_TOKEN"):
        yield ok("Ray's token: in RAY_AUTH_TOKEN")
    elif not file.is_file():
        yield warning(
            f"Ray's token: there is none at {file}",
            "for a cluster of several nodes: ray get-auth-token --generate, and the same file on every node",
        )
    elif file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        yield warning(f"Ray's token: others can read {file}", f"chmod 600 {file}")
    else:
        yield ok(f"Ray's token: in {file}")


def connect() -> Iterator[Finding]:
    """Joins the cluster that RAY_ADDRESS names, or that of this node."""
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "auto")
    if address == "local":
        yield ok("Ray: RAY_ADDRESS=local: a run starts a cluster of its own, on this machine")
        return
    try:
        if problem := unreachable(address):
            if "RAY_ADDRESS" in os.environ:
                yield failure(
                    f"Ray: RAY_ADDRESS={address}: {problem}",
                    "start the head (ray start --head), name its address, or set RAY_ADDRESS=local to need no cluster",
                )
            else:
                yield warning(
                    f"Ray: the cluster that was started here is gone: {problem}",
                    "start its head again (ray start --head), or let a run start one of its own",
                )
            return
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (RayError, ConnectionError, ValueError, RuntimeError) as error:
        told = str(error).strip().splitlines()[0]
        if address == "auto" and "Could not find any running Ray instance" in told:
            yield ok("Ray: no cluster runs here; a run starts one of its own, on this machine")
        else:
            yield failure(f"Ray: {address}: {told}", "use the cluster's token, Python and Ray version here")


def guard(address: str) -> Iterator[Finding]:
    """Whether the cluster refuses a token that is not its own. The client goes on trying; its first word counts."""
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    command = [sys.executable, "-c", f"import ray; ray.init({address!r}, log_to_driver=False); print('JOINED')"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        words = ("JOINED", "InvalidAuthToken")
        deadline = Timer(GUARD_S, process.kill)  # it ends the output
        deadline.start()
        said = next((word for line in process.stdout for word in words if word in line), None)
        deadline.cancel()
        process.kill()
    if said == "InvalidAuthToken":
        yield ok("Ray: refuses a wrong token")
    elif said == "JOINED":
        yield failure(
            "Ray: takes any token: who reaches the cluster's ports can run code there",
            "start every node with RAY_AUTH_MODE=token, after ray get-auth-token --generate",
        )
    else:
        yield warning("Ray: what it does with a wrong token could not be found out", "try ray status with one")


def resources(recipe: Recipe | None) -> Iterator[Finding]:
    """What the cluster has and, with a recipe, whether its actors find room."""
    nodes = [_node(node) for node in _alive()]
    has = f"{len(nodes)} nodes, {sum(node.gpus for node in nodes)} GPUs, {sum(node.cpus for node in nodes)} CPUs"
    left = place(actors_of(recipe), nodes)[1] if recipe else []
    if left:
        roles = ", ".join(sorted({actor.role for actor in left}))
        yield failure(
            f"Ray: {has}: {len(left)} of the recipe's actors ({roles}) find no room",
            "add nodes or wait for them (ray status), or lower rollout.actors, reward.workers or learner.ranks",
        )
    else:
        yield ok(f"Ray: {has}")
    if recipe and len(nodes) > 1 and not Path(recipe.run.folder).is_absolute():
        yield failure(
            f"run.folder: {recipe.run.folder}: each of the {len(nodes)} nodes has its own working directory",
            "give the absolute path of a folder that all of them see",
        )


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _node(node: dict[str, Any]) -> Node:
    has = node["Resources"]
    return Node(node["NodeManagerAddress"], int(has.get("GPU", 0)), int(has.get("CPU", 0)))


def each_node(recipe: Recipe | None) -> Iterator[tuple[str, Iterable[Finding]]]:
    """A node's checks on every node; whether all see the run's folder; and a broadcast between them."""
    nodes = _alive()
    refs = [_on(node, _findings_of).remote(check_node, recipe) for node in nodes]
    for node, ref in zip(nodes, refs, strict=True):
        yield f"node {node['NodeManagerAddress']}", _findings(ref)
    if len(nodes) > 1:
        yield "between nodes", chain(sees_run_folder(recipe, nodes), broadcast(nodes))


def _on(node: dict[str, Any], function: Any, gpus: int = 0) -> Any:
    where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(function).options(num_cpus=0, num_gpus=gpus, scheduling_strategy=where, max_retries=0)


def _findings_of(check: Callable[[Recipe | None], Iterator[Finding]], recipe: Recipe | None) -> list[Finding]:
    return list(check(recipe))


def _findings(ref: Any) -> list[Finding]:
    try:
        return ray.get(ref, timeout=TIMEOUT_S)
    except (GetTimeoutError, RayError) as error:
        told = str(error).strip().splitlines()[-1]
        return [failure(f"the checks did not end: {told}", "install c2f_ray there; look at the node with ray status")]


def sees_run_folder(recipe: Recipe | None, nodes: list[dict[str, Any]]) -> Iterator[Finding]:
    folder = Path(recipe.run.folder if recipe else "runs")
    if recipe is None or not folder.is_absolute():
        return
    place = next(part for part in (folder, *folder.parents) if part.is_dir())
    with NamedTemporaryFile(dir=place, prefix=".c2f-ray-doctor-") as file:
        refs = [_on(node, os.path.exists).remote(file.name) for node in nodes]
        seen = ray.get(refs, timeout=TIMEOUT_S)
    blind = [node["NodeManagerAddress"] for node, sees in zip(nodes, seen, strict=True) if not sees]
    if blind:
        yield failure(
            f"run folder: {', '.join(blind)} cannot see what is written to {place} here",
            "mount the same file system on every node",
        )
    else:
        yield ok(f"run folder: all nodes see {place}")


def broadcast(nodes: list[dict[str, Any]]) -> Iterator[Finding]:
    """Over gloo between all nodes; over NCCL between those with GPUs, of which each lends a free one."""
    with_gpus = [node for node in nodes if _node(node).gpus]
    for backend, members in (("gloo", nodes), ("nccl", with_gpus)):
        if len(members) < 2:
            continue
        _store, host, port = open_store_here()
        refs = [
            _on(node, take_part, gpus=int(backend == "nccl")).remote(backend, rank, len(members), host, port)
            for rank, node in enumerate(members)
        ]
        try:
            ray.get(refs, timeout=TIMEOUT_S)
            yield ok(f"broadcast over {backend}: between {len(members)} nodes")
        except (GetTimeoutError, RayError) as error:
            told = str(error).strip().splitlines()[-1]
            yield failure(
                f"broadcast over {backend} between {len(members)} nodes: {told}",
                f"open all ports between the nodes, and name the interface in {backend.upper()}_SOCKET_IFNAME",
            )
