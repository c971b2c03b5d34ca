"""Merging as a stream: every input byte is read once, whatever the number of outputs, in a few chunks of memory.

A safetensors file is an 8-byte length, a JSON header, and the tensors one after the other; names, shapes and dtypes
are known before the first weight is read, so each output is written front to back while the inputs go by.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import EllipsisType

import torch
from safetensors import safe_open
from torch import Tensor

from c2f_ray.data.model_folder import TensorSpec
from c2f_ray.errors import C2FError
from c2f_ray.merging.methods import ROLES, merge_tensor

CHUNK_ELEMENTS = 1 << 18  # of each tensor in memory at a time; larger ones leave the cache
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Variant:
    """One fine actor to be made."""

    method: str
    ratio: float

    @property
    def name(self) -> str:
        return f"{self.method}-{self.ratio:g}"


@dataclass(frozen=True)
class Shard:
    """One output file, the same in every variant's folder: its tensors in the order in which they lie in it."""

    file_name: str
    tensors: dict[str, tuple[str, tuple[int, ...]]]  # name: (safetensors dtype, shape)

    @property
    def num_bytes(self) -> int:
        """Of the tensors, without the header."""
        return sum(tensor_bytes(dtype, shape) for dtype, shape in self.tensors.values())


@dataclass(frozen=True)
class ShardDigests:
    """SHA-256 hex digests: of each input tensor's bytes, by role and name, and of each variant's whole file."""

    inputs: dict[str, dict[str, str]]
    files: dict[str, str]


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * TORCH_DTYPES[dtype].itemsize


def plan_shards(specs: Mapping[str, TensorSpec], dtype: str | None, max_bytes: int) -> list[Shard]:
    """Split the output into files of at most ``max_bytes``; a larger tensor gets a file of its own.

    ``dtype`` is safetensors' name of the dtype of every tensor; each one's own in ``specs`` when None.
    """
    groups: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    size = 0
    for name, spec in specs.items():
        written = dtype or spec.dtype
        added = tensor_bytes(written, spec.shape)
        if groups[-1] and size + added > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = (written, spec.shape)
        size += added
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    # Widest dtype first keeps every tensor aligned to its element size.
    ordered = [
        sorted(group.items(), key=lambda item: (-TORCH_DTYPES[item[1][0]].itemsize, item[0])) for group in groups
    ]
    return [Shard(name, dict(group)) for name, group in zip(names, ordered, strict=True)]


def merge_shard(
    shard: Shard,
    inputs: Mapping[str, Mapping[str, TensorSpec]],
    variants: Sequence[Variant],
    folders: Mapping[str, Path],
) -> ShardDigests:
    """Write one shard of every variant into ``folders[variant.name]``.

    ``inputs`` holds each role's tensors of this shard. Raises C2FError when a merged value is not finite, which
    float16 makes of values beyond 65504.
    """
    input_digests: dict[str, dict[str, str]] = {role: {} for role in inputs}
    with ExitStack() as stack:
        paths = {spec.file for specs in inputs.values() for spec in specs.values()}
        readers = {path: stack.enter_context(safe_open(path, framework="pt")) for path in paths}
        writers = {name: stack.enter_context((path / shard.file_name).open("wb")) for name, path in folders.items()}
        file_hashes = {name: hashlib.sha256() for name in folders}

        def write(name: str, data: bytes | memoryview) -> None:
            writers[name].write(data)
            file_hashes[name].update(data)

        for name in folders:
            write(name, _header(shard))
        for tensor, (dtype, shape) in shard.tensors.items():
            slices = {role: readers[specs[tensor].file].get_slice(tensor) for role, specs in inputs.items()}
            hashes = {role: hashlib.sha256() for role in inputs}
            for rows in _row_chunks(shape):
                chunk = {role: part[rows] for role, part in slices.items()}
                for role, values in chunk.items():
                    hashes[role].update(_bytes(values))
                for variant in variants:
                    roles = {role: chunk[role] for role in ROLES[variant.method]}
                    fine = merge_tensor(variant.method, roles, variant.ratio, TORCH_DTYPES[dtype])
                    if fine.numel() and not torch.isfinite(fine.float().abs().amax()):  # NaN passes through amax
                        raise C2FError(
                            f"merge: {variant.name} has values in {tensor} that are not finite in {dtype}: "
                            "check the inputs, or set merge.dtype to bfloat16 or float32"
                        )
                    write(variant.name, _bytes(fine))
            for role, digest in hashes.items():
                input_digests[role][tensor] = digest.hexdigest()
        for writer in writers.values():
            writer.flush()
            os.fsync(writer.fileno())
    return ShardDigests(input_digests, {name: digest.hexdigest() for name, digest in file_hashes.items()})


def _header(shard: Shard) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in shard.tensors.items():
        start, end = end, end + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _row_chunks(shape: tuple[int, ...]) -> Iterator[slice | EllipsisType]:
    """Slices along the first dimension of about CHUNK_ELEMENTS each; everything at once for a scalar."""
    if not shape:
        yield ...
        return
    step = max(1, CHUNK_ELEMENTS // max(1, prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
