"""Merging as a stream: every input byte is read once, whatever the number of outputs, in pieces that stay in the cache.

Names, shapes and dtypes are known before the first weight is read, so each output is written front to back while the
inputs go by.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from c2f_ray.data.atomic import write_text
from c2f_ray.data.shards import TORCH_DTYPES, Shard, header, raw_bytes
from c2f_ray.errors import C2FError
from c2f_ray.merging.files import InputFile, OutputFile, TensorReader, room_in
from c2f_ray.merging.methods import (
    NEED_WHOLE_TENSOR,
    Settings,
    Whole,
    copied_role,
    drop_factors,
    drop_generator,
    look_at_whole,
    merge_piece,
    widen,
)
from c2f_ray.recipe import MergeMethod

PIECE = 1 << 17  # elements of each tensor at a time; more leave the cache, fewer are overhead


@dataclass(frozen=True)
class Variant:
    """One fine actor to be made."""

    method: MergeMethod
    label: str  # the ratio, or the name of its schedule
    ratios: dict[str, float]  # by tensor

    @property
    def name(self) -> str:
        return f"{self.method}-{self.label}"


@dataclass(frozen=True)
class Work:
    """What the tasks of a merge have in common."""

    files: dict[str, dict[str, Path]]  # by role and tensor
    rows: dict[str, dict[str, Tensor]]  # by vocabulary tensor and role: int64, the row that holds the same token, or -1
    variants: list[Variant]
    settings: Settings
    aside: Path  # has a folder for each variant, `tmp/` and `records/`


def merge_shard(shard: Shard, work: Work) -> None:
    """Write one file of every variant, and then its record, which says that they are complete.

    The record `records/FILE.json` holds XXH3-128 hex digests, ``inputs`` of each tensor's bytes by role and name and
    ``files`` of each variant's whole file, and ``sums`` by tensor: |coarse - base|^2, |instruct - base|^2 and
    their product, where the base model is read.

    Raises C2FError when a merged value is not finite (float16 makes that of values beyond 65504), when an input ends
    early, and when there is no room for an output.
    """
    temporary = {variant.name: work.aside / "tmp" / f"{variant.name}-{uuid4().hex}" for variant in work.variants}
    with room_in(work.aside):
        try:
            record = _write_files(shard, work, temporary)
            for name, path in temporary.items():
                path.rename(work.aside / name / shard.file_name)
        finally:
            for path in temporary.values():
                path.unlink(missing_ok=True)
        # A task of an earlier merge may still be writing the same record.
        write_text(work.aside / "records" / f"{shard.file_name}.json", json.dumps(record), suffix=f".{uuid4().hex}")


def _write_files(shard: Shard, work: Work, paths: Mapping[str, Path]) -> dict[str, object]:
    """Write one shard of every variant to ``paths`` and return its record."""
    digests: dict[str, dict[str, str]] = {role: {} for role in work.files}
    scratch = Scratch()
    sums: dict[str, list[float]] = {}
    with ExitStack() as stack:
        needed = {by_name[name] for by_name in work.files.values() for name in shard.tensors}
        inputs = {path: stack.enter_context(InputFile(path)) for path in needed}
        outputs = {name: stack.enter_context(OutputFile(path)) for name, path in paths.items()}
        for output in outputs.values():
            output.write(header(shard))
        for name, (dtype, _) in shard.tensors.items():
            models = {role: TensorReader(inputs[by_name[name]], name) for role, by_name in work.files.items()}
            sums[name] = _merge_tensor(name, TORCH_DTYPES[dtype], models, work, outputs, scratch)
            for role, reader in models.items():
                digests[role][name] = reader.digest.hexdigest()
        for output in outputs.values():
            output.sync()
    return {"inputs": digests, "files": {name: o.digest.hexdigest() for name, o in outputs.items()}, "sums": sums}


class Scratch:
    """Memory for one piece that the next one uses again: to touch fresh pages costs more than the arithmetic."""

    def __init__(self) -> None:
        self.raw: dict[str, Tensor] = defaultdict(lambda: torch.empty(4 * PIECE, dtype=torch.uint8))
        self.wide: dict[str, Tensor] = defaultdict(lambda: torch.empty(PIECE))


@dataclass(frozen=True)
class _Piece:
    inputs: dict[str, Tensor]  # by role, in their own dtypes, 1-D
    absent: Tensor | None  # bool: elements of tokens that not all models have, where the instruct model's are kept

    def present(self) -> dict[str, Tensor]:
        return self.inputs if self.absent is None else {r: v[~self.absent] for r, v in self.inputs.items()}


def _read_tensor(
    readers: Mapping[str, TensorReader],
    rows: Mapping[str, Tensor] | None,
    used: Set[str],
    settings: Settings,
    scratch: Scratch,
) -> tuple[Iterator[_Piece], Whole]:
    """One tensor of all models in pieces, and what the methods in ``used`` must see of all of it first.

    A piece may lie in ``scratch``: it is there until the next one is taken.
    """
    count = prod(readers["instruct"].shape)
    if rows is None and used.isdisjoint(NEED_WHOLE_TENSOR):

        def stream() -> Iterator[_Piece]:
            for part in _parts(count):
                size = part.stop - part.start
                yield _Piece({role: reader.read(size, scratch.raw[role]) for role, reader in readers.items()}, None)

        return stream(), Whole()

    tensors = {role: reader.read(prod(reader.shape)).view(reader.shape) for role, reader in readers.items()}
    absent = _align_rows(tensors, rows) if rows is not None else None
    flat = {role: tensor.reshape(-1) for role, tensor in tensors.items()}

    def pieces() -> Iterator[_Piece]:
        for part in _parts(count):
            cut = {role: tensor[part] for role, tensor in flat.items()}
            yield _Piece(cut, None if absent is None else absent[part])

    def wide() -> Iterator[dict[str, Tensor]]:
        return (widen(piece.present(), scratch.wide) for piece in pieces())

    present = count if absent is None else int((~absent).sum())
    return pieces(), look_at_whole(wide, present, used, settings)


def _merge_tensor(
    name: str,
    dtype: torch.dtype,
    readers: Mapping[str, TensorReader],
    work: Work,
    outputs: Mapping[str, OutputFile],
    scratch: Scratch,
) -> list[float]:
    """Merge one tensor for all variants; returns its sums, see `merge_shard`."""
    used = {variant.method for variant in work.variants}
    pieces, whole = _read_tensor(readers, work.rows.get(name), used, work.settings, scratch)
    densities = {"instruct": work.settings.instruct_density, "coarse": work.settings.coarse_density}
    generators = {role: drop_generator(work.settings.seed, name, role) for role in densities} if "dare" in used else {}
    sums = [0.0, 0.0, 0.0]
    for piece in pieces:
        wide = widen(piece.inputs, scratch.wide)
        size = wide["instruct"].numel()
        out, narrow = scratch.wide["fine"][:size], scratch.raw["fine"][: size * dtype.itemsize].view(dtype)
        factors = {role: drop_factors(random, size, densities[role]) for role, random in generators.items()}
        for variant in work.variants:
            ratio = variant.ratios[name]
            copied = copied_role(variant.method, ratio, work.settings)
            if copied:
                fine = wide[copied]
            else:
                fine = merge_piece(variant.method, wide, ratio, work.settings, whole, factors, out)
            if piece.absent is not None:
                fine = torch.where(piece.absent, wide["instruct"], fine)
            square = fine.dot(fine).item()  # no element is larger than its root
            fine = narrow.copy_(fine)
            if not square <= torch.finfo(dtype).max ** 2 and not torch.isfinite(fine).all():
                said = str(dtype).removeprefix("torch.")
                raise C2FError(
                    f"merge: {variant.name} has values in {name} that are not finite in {said}: check the inputs, "
                    "or set merge.dtype to bfloat16 or float32"
                )
            outputs[variant.name].write(raw_bytes(fine))
        if "base" in wide:
            coarse, instruct = wide["delta_c"], wide["delta_i"]
            for i, (a, b) in enumerate([(coarse, coarse), (instruct, instruct), (coarse, instruct)]):
                sums[i] += float(a.dot(b))
    return sums


def _parts(count: int) -> Iterator[slice]:
    for start in range(0, count, PIECE):
        yield slice(start, min(start + PIECE, count))


def _align_rows(tensors: dict[str, Tensor], rows: Mapping[str, Tensor]) -> Tensor:
    """Bring the other models' rows into the instruct model's order; returns which elements not all models have.

    Such rows become the instruct model's in all of them, so that they count as unchanged.
    """
    instruct = tensors["instruct"]
    absent = torch.stack(list(rows.values())).amin(0) < 0
    for role, order in rows.items():
        tensors[role] = tensors[role][order.clamp(min=0)]
        tensors[role][absent] = instruct[absent].to(tensors[role].dtype)
    return absent.repeat_interleave(instruct[0].numel())
