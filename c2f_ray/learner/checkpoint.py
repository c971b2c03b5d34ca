"""A trained model on disk: float32 master weights and AdamW's moments, in flat pieces of its parameters.

Each rank writes the pieces that it holds, with no collective. A piece knows where it lies in its parameter, so any
number of ranks under any ZeRO stage reads just what it needs. Frozen parameters are not written.

DeepSpeed hangs what it knows of a parameter on it as attributes; here such a parameter's type is Any.
"""

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from c2f_ray.errors import CheckpointError

if TYPE_CHECKING:
    from c2f_ray.learner.engine import TrainedModel

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
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
        for start, kinds in _pieces(model, parameter):
            # Without ZeRO every rank holds everything; the first one writes it.
            if model.engine.zero_optimization_stage() == 0 and rank > 0:
                continue
            for kind, piece in kinds.items():
                key = f"{kind}/{name}"
                tensors[key], starts[key] = piece.detach().cpu().contiguous(), start
        if sum(tensor.nbytes for tensor in tensors.values()) >= FILE_BYTES:
            write()
    if tensors:
        write()
    return files


def load_model(model: "TrainedModel", folder: Path, prefix: str, adam_steps: int) -> None:
    """Makes the model what it was when ``folder`` was written, by however many ranks.

    ``adam_steps`` is what ``steps_of_adam`` said then. Raises CheckpointError when a parameter is not there whole.
    """
    saved = SavedPieces(sorted(folder.glob(f"{prefix}-rank*.safetensors")))
    if adam_steps > 0 or steps_of_adam(model) > 0:
        _start_moments(model, adam_steps)
    for name, parameter in trainable(model):
        numel = prod(_shape(parameter))
        for start, kinds in _pieces(model, parameter):
            for kind, piece in kinds.items():
                if kind in MOMENTS and adam_steps == 0:
                    piece.data.zero_()
                    continue
                piece.data.copy_(saved.read(f"{kind}/{name}", start, start + piece.numel(), numel))
        if model.engine.zero_optimization_stage() < 3:
            parameter.data.copy_(saved.read(f"{WEIGHT}/{name}", 0, numel, numel).view(parameter.shape))
            continue
        start, held = _zero3_span(parameter)
        if held > 0:
            piece = saved.read(f"{WEIGHT}/{name}", start, start + held, numel)
            parameter.ds_tensor.data.view(-1)[:held].copy_(piece)
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # a small one, which DeepSpeed keeps whole everywhere
            parameter.data.copy_(saved.read(f"{WEIGHT}/{name}", 0, numel, numel).view(parameter.ds_shape))


def steps_of_adam(model: "TrainedModel") -> int:
    """Steps that AdamW's bias correction has counted; the same for every parameter."""
    state = _adam(model).state
    return next((int(entry["step"]) for entry in state.values() if "step" in entry), 0)


def trainable(model: "TrainedModel") -> Iterator[tuple[str, Any]]:
    return ((name, p) for name, p in model.module.named_parameters() if p.requires_grad)


def _pieces(model: "TrainedModel", parameter: Any) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(start in the flat parameter, views [n] by kind) of what this rank holds of it; moments once there are any."""
    stage = model.engine.zero_optimization_stage()
    if stage == 0:
        state = _adam(model).state.get(parameter, {})  # it is its own master: bfloat16 without ZeRO is refused
        yield 0, {WEIGHT: parameter.view(-1)} | {kind: state[kind].view(-1) for kind in MOMENTS if kind in state}
    elif stage == 3:
        start, held = _zero3_span(parameter)
        started = bool(_adam(model).state)
        if held > 0:
            optimizer = parameter._z3_optimizer
            found = {
                kind or WEIGHT: optimizer._get_fp32_opt_state_partition(parameter, False, kind)[0][:held]
                for kind in (None, *(MOMENTS if started else ()))
            }
            yield start, found
    elif parameter._hp_mapping is not None:
        mapping = parameter._hp_mapping
        moments = mapping.optim_fragment or {}
        found = {kind: moments[kind] for kind in MOMENTS if kind in moments}
        yield mapping.lp_fragment_address.start, {WEIGHT: mapping.hp_fragment} | found


def _zero3_span(parameter: Any) -> tuple[int, int]:
    """(start, elements) of this rank's equal part of the flat parameter; the last parts may be short, or empty."""
    size = parameter.ds_tensor.numel()
    start = size * parameter._z3_optimizer._get_param_partition_rank(parameter)
    return start, max(0, min(size, parameter.ds_numel - start))


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _adam(model: "TrainedModel") -> torch.optim.Optimizer:
    optimizer: Any = model.engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def _start_moments(model: "TrainedModel", adam_steps: int) -> None:
    """AdamW makes its state in its first step; here it is made before, to be filled."""
    optimizer: Any = model.engine.optimizer
    stage = model.engine.zero_optimization_stage()
    if stage == 3:
        masters = optimizer.fp32_partitioned_groups_flat
    else:
        masters = [master for group in _adam(model).param_groups for master in group["params"]]
    for master in masters:
        state = _adam(model).state[master]
        state["step"] = torch.tensor(float(adam_steps), device=master.device)
        for kind in MOMENTS:
            state.setdefault(kind, torch.zeros_like(master, requires_grad=False))
    if stage in (1, 2):
        optimizer._lazy_init_hp_params_optimizer_state()


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
