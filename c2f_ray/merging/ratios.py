"""Which ratio each tensor of a fine actor has."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

import numpy as np

from c2f_ray.errors import RecipeError
from c2f_ray.recipe import RatioRule, RatioSchedule

LAYER = re.compile(r"\.(\d+)\.")  # the first number in a tensor's name: model.layers.3.block_sparse_moe.experts.0.w1


def layer_of(tensor: str) -> int | None:
    """The decoder layer that a tensor belongs to; None for embeddings, head and final norm."""
    found = LAYER.search(tensor)
    return int(found[1]) if found else None


def schedule_ratios(key: str, schedule: RatioSchedule, tensors: Iterable[str]) -> dict[str, float]:
    """The ratio of each tensor: that of the first rule that fits it.

    Raises RecipeError, naming the schedule by its dotted ``key``, when a rule's layers are not in the model, and when
    a rule fits no tensor.
    """
    tensors = list(tensors)
    num_layers = max((layer for tensor in tensors if (layer := layer_of(tensor)) is not None), default=-1) + 1
    ratios: dict[str, float] = {}
    problems = []
    for i, rule in enumerate(schedule.rules):
        first, last = rule.layers or (0, num_layers - 1)
        if last >= num_layers:
            problems.append(
                f"{key}.rules.{i}.layers: [{first}, {last}]: the model has {num_layers} layers, counted from 0; "
                f"at most {num_layers - 1}"
            )
            continue
        found = {
            tensor: _ratio(rule, layer_of(tensor), first, last)
            for tensor in tensors
            if tensor not in ratios and _fits(rule, tensor, first, last)
        }
        if not found:
            problems.append(
                f"{key}.rules.{i}: fits no tensor that the rules before it leave; modules is a shell pattern for "
                f"whole names, such as {tensors[len(tensors) // 2]}"
            )
        ratios |= found
    if problems:
        raise RecipeError(*problems)
    return {tensor: ratios.get(tensor, schedule.ratio) for tensor in tensors}


def _fits(rule: RatioRule, tensor: str, first: int, last: int) -> bool:
    layer = layer_of(tensor)
    if (rule.layers or rule.gradient) and not (layer is not None and first <= layer <= last):
        return False
    return rule.modules is None or fnmatchcase(tensor, rule.modules)


def _ratio(rule: RatioRule, layer: int | None, first: int, last: int) -> float:
    if rule.gradient is None:
        assert rule.ratio is not None  # a rule has exactly one of the two
        return rule.ratio
    assert layer is not None  # a gradient fits nothing else
    return float(np.interp(layer, np.linspace(first, last, len(rule.gradient)), rule.gradient))
