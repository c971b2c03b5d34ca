"""The nodes and GPUs that a cluster file brings up: files of `ray up`, KubeRay manifests, Slurm scripts."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from c2f_ray.errors import RecipeError
from c2f_ray.recipe import Recipe
from c2f_ray.recipe.roles import train_roles

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A type of GPU: the memory that it offers, and its data sheet's peak rates."""

    name: str
    memory: float  # bytes
    flops: float  # bfloat16 operations a second, dense
    bandwidth: float  # of its memory, bytes a second


# By Ray's names of accelerator types.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-40G", 39.4 * GIB, 312e12, 1.555e12),
        Gpu("A100-80G", 79.2 * GIB, 312e12, 2.039e12),
        Gpu("L40S", 44.5 * GIB, 362e12, 0.864e12),
        Gpu("H100", 79.6 * GIB, 989e12, 3.35e12),
        Gpu("H200", 139.8 * GIB, 989e12, 4.8e12),
        Gpu("B200", 178.4 * GIB, 2250e12, 8e12),
    )
}


# One core, of ours: for `--simulate`, which also runs recipes without a GPU. No table is made of it.
CPU = Gpu("CPU core", 0.0, 50e9, 10e9)


@dataclass(frozen=True)
class Node:
    kind: str  # what the file calls its type, such as `rollout`
    gpus: int
    cpus: int


@dataclass(frozen=True)
class Nodes:
    """A cluster when all of its nodes are up, whose GPUs are of one type."""

    nodes: list[Node]
    gpu: Gpu

    @property
    def gpus(self) -> int:
        return sum(node.gpus for node in self.nodes)


@dataclass(frozen=True)
class Actor:
    role: str
    gpus: int  # of one node
    cpus: int


def actors_of(recipe: Recipe) -> list[Actor]:
    """All that `train` starts. An actor without a GPU takes a CPU."""
    return [
        Actor(role.name.split()[0], role.gpus, int(role.gpus == 0))
        for role in train_roles(recipe)
        for _ in range(role.count)
    ]


def gpu_type(key: str, name: str, memory_gib: float | None = None) -> Gpu:
    if name not in GPUS:
        raise RecipeError(f"{key}: {name!r} is not one of {', '.join(GPUS)}; name the one that is closest")
    gpu = GPUS[name]
    return gpu if memory_gib is None else replace(gpu, memory=memory_gib * GIB)


def chosen_nodes(
    recipe: Recipe, file: Path | None, gpus: int | None, per_node: int, gpu: str | None, memory_gib: float | None
) -> Nodes:
    """The nodes of a cluster file; else so many GPUs, or as many as the recipe asks for, and a head without any.

    ``gpu`` and ``memory_gib`` are of other GPUs than the file names.
    """
    if file is not None:
        if gpus is not None:
            raise RecipeError("--gpus: the cluster file says how many there are; give one of --cluster and --gpus")
        found = read_cluster(file)
        return replace(found, gpu=gpu_type("--gpu", gpu or found.gpu.name, memory_gib))
    actors = actors_of(recipe)
    gpus = sum(actor.gpus for actor in actors) if gpus is None else gpus
    sizes = [min(per_node, gpus - start) for start in range(0, gpus, per_node)]
    head = Node("head", 0, sum(actor.cpus for actor in actors))
    return Nodes([head, *(Node("node", size, 0) for size in sizes)], gpu_type("--gpu", gpu or "A100-80G", memory_gib))


def read_cluster(file: Path) -> Nodes:
    """Raises RecipeError naming the file and what it lacks."""
    if not file.is_file():
        raise RecipeError(f"--cluster: {file}: no such file")
    text = file.read_text(encoding="utf-8")
    try:
        if text.startswith("#!"):
            return _slurm(file, text)
        content = yaml.safe_load(text)
        if "kind" in content:
            return _kuberay(file, content)
        return _ray_up(file, content)
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(
            f"--cluster: {file}: neither a file of ray up, nor a RayCluster or RayJob, nor a Slurm script ({error!r})"
        ) from None


def _ray_up(file: Path, content: dict[str, Any]) -> Nodes:
    """Its `metadata`, which Ray leaves to the user, names the GPU; on premises, where Ray knows no types, the nodes."""
    metadata = content.get("metadata", {})
    if content["provider"]["type"] == "local":
        found = [Node(node["type"], node.get("GPU", 0), node["CPU"]) for node in metadata["nodes"]]
    else:
        found = []
        for kind, node in content["available_node_types"].items():
            count = 1 if kind == content["head_node_type"] else node.get("min_workers", 0)
            found += [Node(kind, node["resources"].get("GPU", 0), node["resources"]["CPU"])] * count
    return Nodes(found, _named(file, metadata.get("gpu"), "metadata.gpu"))


def _kuberay(file: Path, content: dict[str, Any]) -> Nodes:
    spec = content["spec"]
    spec = spec.get("rayClusterSpec", spec)

    def node(kind: str, group: dict[str, Any]) -> Node:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        return Node(kind, int(limits.get("nvidia.com/gpu", 0)), int(limits["cpu"]))

    workers = [node(group["groupName"], group) for group in spec["workerGroupSpecs"] for _ in range(group["replicas"])]
    head = node("head", spec["headGroupSpec"])
    if spec["headGroupSpec"].get("rayStartParams", {}).get("num-cpus") == "0":
        head = replace(head, cpus=0)
    annotations = content["metadata"].get("annotations", {})
    return Nodes([head, *workers], _named(file, annotations.get("c2f-ray/gpu"), "metadata.annotations c2f-ray/gpu"))


def _slurm(file: Path, script: str) -> Nodes:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", script, re.MULTILINE))
    named = re.search(r"^# gpu: (\S+)", script, re.MULTILINE)
    node = Node("node", int(options["gpus-per-node"]), int(options["cpus-per-task"]))
    return Nodes([node] * int(options["nodes"]), _named(file, named[1] if named else None, "a line `# gpu: TYPE`"))


def _named(file: Path, name: str | None, where: str) -> Gpu:
    if name is None:
        raise RecipeError(f"--cluster: {file}: says nowhere what its GPUs are; add {where}, one of {', '.join(GPUS)}")
    return gpu_type(f"--cluster: {file}: {where}", name)


def place(actors: list[Actor], nodes: list[Node]) -> tuple[list[list[Actor]], list[Actor]]:
    """Actors by node, and those that found no room: the largest first, each on a node of its role's name if it can.

    Ray asks for no such order: it places rollout actors first, so an actor of several GPUs may find each node with
    too few left though the sum is enough.
    """
    free = [[node.gpus, node.cpus] for node in nodes]
    placed: list[list[Actor]] = [[] for _ in nodes]
    left: list[Actor] = []
    for actor in sorted(actors, key=lambda actor: -actor.gpus):
        fits = [i for i, (gpus, cpus) in enumerate(free) if gpus >= actor.gpus and cpus >= actor.cpus]
        if not fits:
            left.append(actor)
            continue
        # A node of its own role first; an actor without a GPU goes where there is none.
        chosen = min(fits, key=lambda i: (nodes[i].kind != actor.role, (actor.gpus == 0) * nodes[i].gpus))
        free[chosen][0] -= actor.gpus
        free[chosen][1] -= actor.cpus
        placed[chosen].append(actor)
    return placed, left
