"""Merging as a stream: every input byte is read once, whatever the number of outputs, in a few chunks of memory.

Names, shapes and dtypes are known before the first weight is read, so each output is written front to back while the
inputs go by.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import EllipsisType

import torch
from safetensors import safe_open

from c2f_ray.data.model_folder import TensorSpec
from c2f_ray.data.shards import TORCH_DTYPES, Shard, header, raw_bytes
from c2f_ray.errors import C2FError
from c2f_ray.merging.methods import ROLES, merge_tensor

CHUNK_ELEMENTS = 1 << 18  # of each tensor in memory at a time; larger ones leave the cache


@dataclass(frozen=True)
class Variant:
    """One fine actor to be made."""

    method: str
    ratio: float

    @property
    def name(self) -> str:
        return f"{self.method}-{self.ratio:g}"


@dataclass(frozen=True)
class ShardDigests:
    """SHA-256 hex digests: of each input tensor's bytes, by role and name, and of each variant's whole file."""

    inputs: dict[str, dict[str, str]]
    files: dict[str, str]


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
            write(name, header(shard))
        for tensor, (dtype, shape) in shard.tensors.items():
            slices = {role: readers[specs[tensor].file].get_slice(tensor) for role, specs in inputs.items()}
            hashes = {role: hashlib.sha256() for role in inputs}
            for rows in _row_chunks(shape):
                chunk = {role: part[rows] for role, part in slices.items()}
                for role, values in chunk.items():
                    hashes[role].update(raw_bytes(values))
                for variant in variants:
                    roles = {role: chunk[role] for role in ROLES[variant.method]}
                    fine = merge_tensor(variant.method, roles, variant.ratio, TORCH_DTYPES[dtype])
                    if fine.numel() and not torch.isfinite(fine.float().abs().amax()):  # NaN passes through amax
                        raise C2FError(
                            f"merge: {variant.name} has values in {tensor} that are not finite in {dtype}: "
                            "check the inputs, or set merge.dtype to bfloat16 or float32"
                        )
                    write(variant.name, raw_bytes(fine))
            for role, digest in hashes.items():
                input_digests[role][tensor] = digest.hexdigest()
        for writer in writers.values():
            writer.flush()
            os.fsync(writer.fileno())
    return ShardDigests(input_digests, {name: digest.hexdigest() for name, digest in file_hashes.items()})


def _row_chunks(shape: tuple[int, ...]) -> Iterator[slice | EllipsisType]:
    """Slices along the first dimension of about CHUNK_ELEMENTS each; everything at once for a scalar."""
    if not shape:
        yield ...
        return
    step = max(1, CHUNK_ELEMENTS // max(1, prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))
