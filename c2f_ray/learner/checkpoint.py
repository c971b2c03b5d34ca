"""A trained model on disk: float32 master weights and AdamW's moments, in flat pieces of its parameters.

Each rank writes the pieces that it holds, with no collective. A piece knows where it lies in its parameter, so any
number of ranks under any ZeRO stage reads just what it needs. Frozen parameters are not written.
"""

import json
from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from c2f_ray.adapters.deepspeed import (
    MOMENTS,
    WEIGHT,
    adam,
    full_shape,
    read_part,
    start_moments,
    write_computing_copy,
    write_part,
)
from c2f_ray.errors import CheckpointError

if TYPE_CHECKING:
    from c2f_ray.learner.engine import TrainedModel

FILE_BYTES = 1 << 30  # pieces in one file, about: a file is copied whole in memory before it is written


def save_model(model: "TrainedModel", folder: Path, prefix: str, rank: int) -> list[Path]:
    """Writes this rank's pieces as ``PREFIX-rankR-*.safetensors``; returns the files."""
    files: list[Path] = []
    tensors: dict[str, Tensor] = {}
    starts: dict[str, int] = {}

    def write() -> None:
        path = folder / f"{prefix}-rank{rank:05d}-{len(files):05d}.safetensors"
        save_file(tensors, path, {"format": "pt", "starts": json.dumps(starts)})
        files.append(path)
        tensors.clear()
        starts.clear()

    for name, parameter in trainable(model):
        # Without ZeRO every rank holds everything; the first one writes it.
        if model.engine.zero_optimization_stage() == 0 and rank > 0:
            continue
        start, part = read_part(model.engine, parameter)
        for kind, piece in part.items():
            key = f"{kind}/{name}"
            tensors[key], starts[key] = piece.detach().cpu().contiguous(), start
        if sum(tensor.nbytes for tensor in tensors.values()) >= FILE_BYTES:
            write()
    if tensors:
        write()
    return files


def load_model(model: "TrainedModel", folder: Path, prefix: str, adam_steps: int) -> None:
    """Restores the model that was written to ``folder`` by any number of ranks.

    ``adam_steps`` is what ``steps_of_adam`` returned then. Raises CheckpointError when part of a parameter is missing.
    """
    engine = model.engine
    saved = SavedPieces(sorted(folder.glob(f"{prefix}-rank*.safetensors")))
    if adam_steps > 0 or steps_of_adam(model) > 0:
        start_moments(engine, adam_steps)
    for name, parameter in trainable(model):
        numel = prod(full_shape(parameter))
        start, part = read_part(engine, parameter)
        for kind, piece in part.items():
            if kind in MOMENTS and adam_steps == 0:
                values = torch.zeros_like(piece)
            else:
                values = saved.read(f"{kind}/{name}", start, start + piece.numel(), numel)
            write_part(engine, parameter, kind, values)
        write_computing_copy(engine, parameter, partial(saved.read, f"{WEIGHT}/{name}", numel=numel))


def steps_of_adam(model: "TrainedModel") -> int:
    """Returns the steps that AdamW's bias correction has counted; the same for every parameter."""
    state = adam(model.engine).state
    return next((int(entry["step"]) for entry in state.values() if "step" in entry), 0)


def trainable(model: "TrainedModel") -> Iterator[tuple[str, Any]]:
    return ((name, p) for name, p in model.module.named_parameters() if p.requires_grad)


class SavedPieces:
    """All ranks' files of one model."""

    def __init__(self, files: list[Path]) -> None:
        self.spans: dict[str, list[tuple[int, int, Path]]] = {}
        for path in files:
            with safe_open(path, framework="pt") as tensors:
                for key, start in json.loads(tensors.metadata()["starts"]).items():
                    (numel,) = tensors.get_slice(key).get_shape()
                    self.spans.setdefault(key, []).append((start, start + numel, path))

    def read(self, key: str, start: int, stop: int, numel: int) -> Tensor:
        """Elements ``start`` to ``stop``, float32, of the parameter's ``numel``."""
        spans = sorted(self.spans.get(key, []))
        if sum(end - begin for begin, end, _ in spans) != numel:
            raise CheckpointError(f"the checkpoint has another {key} than the {numel} elements of this model's")
        parts = []
        for begin, end, path in spans:
            low, high = max(begin, start), min(end, stop)
            if low < high:
                with safe_open(path, framework="pt") as tensors:
                    parts.append(tensors.get_slice(key)[low - begin : high - begin])
        return torch.cat(parts)
