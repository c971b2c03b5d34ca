"""A model's weights as safetensors files that are written while the tensors go by.

A safetensors file is an 8-byte length, a JSON header, and the tensors one after the other; names, shapes and dtypes
are known before the first weight is, so every tensor's place is too.

Nothing here imports transformers: a merge's tasks have only torch to load.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Shard:
    """One file: its tensors in the order in which they lie in it."""

    file_name: str
    tensors: dict[str, tuple[str, tuple[int, ...]]]  # name: (safetensors dtype, shape)

    @property
    def num_bytes(self) -> int:
        """Of the tensors, without the header."""
        return sum(tensor_bytes(dtype, shape) for dtype, shape in self.tensors.values())


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * TORCH_DTYPES[dtype].itemsize


def plan_shards(tensors: Mapping[str, tuple[str, tuple[int, ...]]], max_bytes: int) -> list[Shard]:
    """Splits ``{name: (safetensors dtype, shape)}`` into files of at most ``max_bytes``, named as Hugging Face does.

    A larger tensor gets a file of its own.
    """
    groups: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    size = 0
    for name, (dtype, shape) in tensors.items():
        added = tensor_bytes(dtype, shape)
        if groups[-1] and size + added > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = (dtype, shape)
        size += added
    names = [WEIGHTS]
    if len(groups) > 1:
        names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    # Widest dtype first keeps every tensor aligned to its element size.
    ordered = [
        sorted(group.items(), key=lambda item: (-TORCH_DTYPES[item[1][0]].itemsize, item[0])) for group in groups
    ]
    return [Shard(name, dict(group)) for name, group in zip(names, ordered, strict=True)]


def write_shards(folder: Path, shards: Sequence[Shard], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes all tensors of the shards, in whatever order they come, with one in memory at a time, and the index."""
    with ExitStack() as stack:
        places = {}
        for shard in shards:
            file = stack.enter_context((folder / shard.file_name).open("wb"))
            offset = file.write(header(shard))
            for name, (dtype, shape) in shard.tensors.items():
                places[name] = file, offset
                offset += tensor_bytes(dtype, shape)
        for name, tensor in tensors:
            file, offset = places.pop(name)
            file.seek(offset)
            file.write(raw_bytes(tensor.cpu()))
        assert not places  # every shard is whole
    write_index(folder, shards)


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Says which file has which tensor, where there are several."""
    if len(shards) == 1:
        return
    elements = sum(prod(shape) for shard in shards for _, shape in shard.tensors.values())
    index = {
        "metadata": {"total_parameters": elements, "total_size": sum(shard.num_bytes for shard in shards)},
        "weight_map": {name: shard.file_name for shard in shards for name in shard.tensors},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def header(shard: Shard) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in shard.tensors.items():
        start, end = end, end + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def raw_bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
