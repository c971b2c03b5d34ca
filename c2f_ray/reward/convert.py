"""UltraRM's published pickles as safetensors, once."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from c2f_ray.data.atomic import sha256
from c2f_ray.errors import RecipeError
from c2f_ray.reward.ultrarm import UltraRM

# Older transformers saved these tables, which follow from the configuration.
DERIVED = "rotary_emb.inv_freq"
CONVERSION = "conversion.json"


def convert_reward(folder: Path) -> list[Path]:
    """Writes `folder`'s `.bin` shards as safetensors beside them, file by file. Returns the files, the index last.

    Only tensors are read (``weights_only``); keys and shapes must be UltraRM's. `conversion.json` holds the SHA-256 of
    every file read and written. Nothing is there under its name before all is. Raises RecipeError.
    """
    shards = sorted(folder.glob("pytorch_model*.bin"))
    if not (folder / "config.json").is_file() or not shards:
        raise RecipeError(f"{folder}: no model in .bin files there: config.json or pytorch_model*.bin is missing")
    if any(folder.glob("*.safetensors")):
        raise RecipeError(f"{folder}: has safetensors already; remove them to convert again")
    with torch.device("meta"):
        expected = {
            name: tensor.shape for name, tensor in UltraRM(LlamaConfig.from_pretrained(folder)).state_dict().items()
        }
    partials: dict[Path, Path] = {}
    weight_map: dict[str, str] = {}
    total_bytes = 0
    try:
        for number, shard in enumerate(shards, start=1):
            tensors = read_shard(shard, expected, weight_map)
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            partials[folder / name] = folder / f"{name}.partial"
            save_file(tensors, partials[folder / name], metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
            total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        if missing := sorted(set(expected) - set(weight_map)):
            raise RecipeError(f"{folder}: not an UltraRM checkpoint: {named(missing)} missing from its .bin files")
        digests = {path.name: sha256(path) for path in shards}
        digests |= {path.name: sha256(partial) for path, partial in partials.items()}
    except BaseException:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
        raise
    for path, partial in partials.items():
        partial.rename(path)
    (folder / CONVERSION).write_text(json.dumps({"sha256": digests}, indent=1))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, indent=1))
    return [*partials, index]


def read_shard(shard: Path, expected: dict[str, torch.Size], seen: dict[str, str]) -> dict[str, Tensor]:
    """A shard's tensors, contiguous, each with memory of its own."""
    try:
        loaded: Any = torch.load(shard, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a pickle that holds more than tensors, or half a file
        raise RecipeError(f"{shard}: not loaded, for it is damaged or holds more than tensors: {error}") from None
    tensors = {key: value for key, value in loaded.items() if not key.endswith(DERIVED)}
    if unexpected := sorted(set(tensors) - set(expected)):
        raise RecipeError(f"{shard}: not an UltraRM checkpoint: unexpected {named(unexpected)}")
    for key, tensor in tensors.items():
        if tensor.shape != expected[key]:
            raise RecipeError(f"{shard}: {key} has the shape {[*tensor.shape]}, and config.json {[*expected[key]]}")
        if key in seen:
            raise RecipeError(f"{shard}: {key} is in {seen[key]} too")
    return {key: tensor.clone().contiguous() for key, tensor in tensors.items()}


def named(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
