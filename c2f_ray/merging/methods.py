"""How a coarse actor's weights are merged into an instruct model's, tensor by tensor. Pure: no files, no Ray.

Notation: ``instruct``, ``coarse`` and ``base`` are float32 tensors of one shape, delta_i = instruct - base,
delta_c = coarse - base, r the ratio of the tensor and s the scale. Everything is computed in float32.

A tensor is merged in pieces. Each element depends on its own inputs and, for `slerp` and `ties`, on a few numbers of
the whole tensor that are taken first, so the result is the same however the tensor is cut.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from math import acos, sin, sqrt
from typing import assert_never

import numpy as np
import torch
from torch import Tensor

from c2f_ray.recipe import MergeMethod

# Which models each method reads.
ROLES = {
    "residue": ("instruct", "coarse", "base"),
    "interpolate": ("instruct", "coarse"),
    "task_arithmetic": ("instruct", "coarse", "base"),
    "slerp": ("instruct", "coarse"),
    "ties": ("instruct", "coarse", "base"),
    "dare": ("instruct", "coarse", "base"),
}
FORMULAS = {
    "residue": "fine = instruct + ratio * (coarse - base)",
    "interpolate": "fine = (1 - ratio) * instruct + ratio * coarse",
    "task_arithmetic": "fine = base + scale * ((instruct - base) + ratio * (coarse - base))",
    "slerp": "fine = (sin((1 - ratio) * a) * instruct + sin(ratio * a) * coarse) / sin(a), a the angle between them",
    "ties": "fine = base + scale * weighted mean, of weights 1 and ratio, over those of the trimmed deltas "
    "(instruct - base) and (coarse - base) that have the elected sign",
    "dare": "fine = base + scale * (drop(instruct - base) + ratio * drop(coarse - base))",
}
NEED_WHOLE_TENSOR = ("slerp", "ties")
PARALLEL = 0.9995  # slerp is linear for vectors whose cosine is beyond this: sin(a) is then too small to divide by


@dataclass(frozen=True)
class Whole:
    """What `slerp` and `ties` know of a whole tensor."""

    cosine: float = 0.0  # between instruct and coarse; 1 when one of them is zero
    instruct_threshold: float = 0.0  # least magnitude of the instruct delta that ties keeps
    coarse_threshold: float = 0.0


@dataclass(frozen=True)
class Settings:
    """What the methods take besides the ratio: a recipe's fields of the same names, and its seed."""

    scale: float = 1.0
    instruct_density: float = 1.0
    coarse_density: float = 0.5
    seed: int = 0


def copied_role(method: str, ratio: float, settings: Settings) -> str | None:
    """Whose weights a merge gives back: they are copied, for arithmetic would lose the sign of zero."""
    if ratio == 1 and method in ("interpolate", "slerp"):
        return "coarse"
    added_whole = method in ("residue", "interpolate", "slerp") or settings.scale == 1
    trimmed = method in ("ties", "dare") and settings.instruct_density < 1
    return "instruct" if ratio == 0 and added_whole and not trimmed else None


def residue(instruct: Tensor, delta_c: Tensor, ratio: float, out: Tensor | None = None) -> Tensor:
    """Knowledge Residue Merger: ``instruct + r * delta_c``.

    Mistral-C2F (arXiv 2406.08657) names it and publishes no formula: this one is ours.
    """
    return torch.mul(delta_c, ratio, out=out).add_(instruct)


def interpolate(instruct: Tensor, coarse: Tensor, ratio: float, out: Tensor | None = None) -> Tensor:
    """``(1 - r) * instruct + r * coarse`` (ours). It is `residue` minus ``r * delta_i``."""
    return _weighted(instruct, 1 - ratio, coarse, ratio, out)


def task_arithmetic(
    base: Tensor, delta_i: Tensor, delta_c: Tensor, ratio: float, scale: float, out: Tensor | None = None
) -> Tensor:
    """``base + s * (delta_i + r * delta_c)``: arXiv 2212.04089, section 2, with a weight for the second task vector."""
    return torch.mul(delta_c, ratio, out=out).add_(delta_i).mul_(scale).add_(base)


def slerp(instruct: Tensor, coarse: Tensor, ratio: float, cosine: float, out: Tensor | None = None) -> Tensor:
    """Spherical linear interpolation (Shoemake, SIGGRAPH 1985) of flattened tensors; the lengths are interpolated too.

    ``cosine`` is that of the whole tensors. Beyond +-PARALLEL it is `interpolate`.
    """
    if abs(cosine) > PARALLEL:
        return interpolate(instruct, coarse, ratio, out)
    angle = acos(cosine)
    return _weighted(instruct, sin((1 - ratio) * angle) / sin(angle), coarse, sin(ratio * angle) / sin(angle), out)


def ties(base: Tensor, delta_i: Tensor, delta_c: Tensor, ratio: float, scale: float, whole: Whole) -> Tensor:
    """TIES (arXiv 2306.01708, algorithm 1) with weights 1 and r for the deltas.

    Trim: elements below the whole tensor's threshold become 0. Elect: the sign of ``delta_i + r * delta_c``, where 0
    counts as plus. Merge: the weighted mean of the deltas of that sign, 0 where there is none; times s, onto the base.
    """
    delta_i = delta_i.masked_fill(delta_i.abs() < whole.instruct_threshold, 0)
    delta_c = delta_c.masked_fill(delta_c.abs() < whole.coarse_threshold, 0)
    plus = delta_c * ratio + delta_i >= 0
    agree_i = torch.where(plus, delta_i > 0, delta_i < 0).float()
    agree_c = torch.where(plus, delta_c > 0, delta_c < 0).float().mul_(ratio)
    weight = agree_i + agree_c
    mean = agree_i.mul_(delta_i).add_(agree_c.mul_(delta_c)).div_(weight.masked_fill_(weight == 0, 1))
    return mean.mul_(scale).add_(base)


def dare(
    base: Tensor, delta_i: Tensor, delta_c: Tensor, ratio: float, scale: float, factors: Mapping[str, Tensor]
) -> Tensor:
    """DARE (arXiv 2311.03099, equations 1 to 3) before task arithmetic.

    ``factors`` holds by role, for each element of a delta, 0 (dropped) or 1 / density (kept): `drop_factors`.
    """
    kept_i, kept_c = delta_i * factors["instruct"], delta_c * factors["coarse"]
    return kept_c.mul_(ratio).add_(kept_i).mul_(scale).add_(base)


def widen(inputs: Mapping[str, Tensor], scratch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `merge_piece` takes: the models in float32 by role and, where the base model is among them, the deltas.

    They are written into ``scratch``, float32 tensors of the same names that are as long or longer.
    """
    wide = {role: scratch[role][: values.numel()].copy_(values) for role, values in inputs.items()}
    if "base" in wide:
        for delta, role in (("delta_i", "instruct"), ("delta_c", "coarse")):
            wide[delta] = torch.sub(wide[role], wide["base"], out=scratch[delta][: wide[role].numel()])
    return wide


def merge_piece(
    method: MergeMethod,
    wide: Mapping[str, Tensor],
    ratio: float,
    settings: Settings,
    whole: Whole,
    factors: Mapping[str, Tensor],
    out: Tensor | None = None,
) -> Tensor:
    """One piece of a tensor by the method of that name; ``wide``, of `widen`, is not changed.

    ``out``, as in torch, is memory that the result may be written into.
    """

    def onto_base() -> tuple[Tensor, Tensor, Tensor, float, float]:
        return wide["base"], wide["delta_i"], wide["delta_c"], ratio, settings.scale

    match method:
        case "residue":
            return residue(wide["instruct"], wide["delta_c"], ratio, out)
        case "interpolate":
            return interpolate(wide["instruct"], wide["coarse"], ratio, out)
        case "slerp":
            return slerp(wide["instruct"], wide["coarse"], ratio, whole.cosine, out)
        case "task_arithmetic":
            return task_arithmetic(*onto_base(), out)
        case "ties":
            return ties(*onto_base(), whole)
        case "dare":
            return dare(*onto_base(), factors)
        case unknown:
            assert_never(unknown)


def look_at_whole(
    pieces: Callable[[], Iterable[Mapping[str, Tensor]]], count: int, used: Container[str], settings: Settings
) -> Whole:
    """What the methods in ``used`` must know of a tensor of ``count`` elements, from its pieces (`widen`)."""
    angle, thresholds = 0.0, {"instruct": 0.0, "coarse": 0.0}
    if "slerp" in used:
        angle = cosine((piece["instruct"], piece["coarse"]) for piece in pieces())
    if "ties" in used:
        for role, density in (("instruct", settings.instruct_density), ("coarse", settings.coarse_density)):
            if density < 1:
                deltas = partial(_column, pieces, f"delta_{role[0]}")
                thresholds[role] = magnitude_threshold(deltas, int(density * count))
    return Whole(angle, thresholds["instruct"], thresholds["coarse"])


def _column(pieces: Callable[[], Iterable[Mapping[str, Tensor]]], key: str) -> Iterator[Tensor]:
    for piece in pieces():
        yield piece[key]


def drop_factors(generator: np.random.Generator, count: int, density: float) -> Tensor:
    """0 or 1 / density for each of ``count`` elements: a generator gives the same ones whatever the counts."""
    kept = torch.from_numpy(generator.random(count, dtype=np.float32)) < density
    return kept.float().div_(density)


def drop_generator(seed: int, tensor: str, role: str) -> np.random.Generator:
    """The random numbers of one tensor's delta: a function of these three, so of no file, task or order."""
    key = int.from_bytes(sha256(f"{seed}/{tensor}/{role}".encode()).digest()[:16])
    return np.random.Generator(np.random.Philox(key=key))


def cosine(pieces: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Of two float32 vectors given in pieces, in float64; 1 when one of them is zero."""
    dot = left = right = 0.0
    for a, b in pieces:
        a, b = a.double(), b.double()
        dot, left, right = dot + float(a.dot(b)), left + float(a.dot(a)), right + float(b.dot(b))
    return max(-1.0, min(1.0, dot / sqrt(left * right))) if left and right else 1.0


def magnitude_threshold(pieces: Callable[[], Iterable[Tensor]], keep: int) -> float:
    """The ``keep``-th largest magnitude of a float32 vector, exactly, from two passes over its pieces.

    The bits of non-negative floats are in the order of their values: one pass counts the upper halves, one the lower
    halves of those that have the sought upper half. At least one is kept. Elements as large as it are all kept.
    """
    upper, left = _bucket((_bits(piece) >> 16 for piece in pieces()), max(keep, 1))
    lower, _ = _bucket((bits[bits >> 16 == upper] & 0xFFFF for bits in map(_bits, pieces())), left)
    return torch.tensor(upper << 16 | lower, dtype=torch.int32).view(torch.float32).item()


def _bits(values: Tensor) -> Tensor:
    return values.abs().view(torch.int32)


def _bucket(pieces: Iterable[Tensor], keep: int) -> tuple[int, int]:
    """The ``keep``-th largest of numbers below 2^16, and its rank among those equal to it."""
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for piece in pieces:
        counts += torch.bincount(piece, minlength=1 << 16)
    at_least = counts.flip(0).cumsum(0).flip(0)  # how many are so large or larger
    bucket = int((at_least >= keep).sum()) - 1
    return bucket, keep - int(at_least[bucket] - counts[bucket])


def _weighted(a: Tensor, weight_a: float, b: Tensor, weight_b: float, out: Tensor | None) -> Tensor:
    # Not torch.lerp or add(alpha=): a fused multiplication would round differently at the ends of a vector.
    return torch.mul(a, weight_a, out=out).add_(b * weight_b)
