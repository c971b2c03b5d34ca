"""What a coarse actor changed, beside what the instruct model changed: per layer, from sums taken while merging."""

from collections.abc import Iterable, Mapping
from math import sqrt
from typing import Any

from c2f_ray.merging.ratios import layer_of

DIAGNOSIS = "diagnosis.json"  # in a run's folder


def diagnose(records: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """From the records of all shards (`shards.merge_shard`), in order: layers, then what lies outside them by module.

    A row holds ``name``, ``residue_norm`` = |coarse - base|, ``instruct_norm`` = |instruct - base| and their
    ``cosine``, null where one of them is zero. The last row, ``all``, is of the whole model.
    """
    sums: dict[str | int, list[float]] = {}
    for record in records:
        for tensor, values in record["sums"].items():
            layer = layer_of(tensor)
            for group in ("all", layer if layer is not None else tensor.removesuffix(".weight").split(".")[-1]):
                sums[group] = [a + b for a, b in zip(sums.get(group, [0.0] * 3), values, strict=True)]
    layers = sorted(group for group in sums if isinstance(group, int))
    modules = sorted(group for group in sums if isinstance(group, str) and group != "all")
    rows = [_row(f"layer {layer}", sums[layer]) for layer in layers] + [_row(name, sums[name]) for name in modules]
    return {"rows": [*rows, _row("all", sums["all"])]}


def _row(name: str, sums: list[float]) -> dict[str, Any]:
    residue, instruct = sqrt(sums[0]), sqrt(sums[1])
    cosine = sums[2] / (residue * instruct) if residue and instruct else None
    return {"name": name, "residue_norm": residue, "instruct_norm": instruct, "cosine": cosine}
