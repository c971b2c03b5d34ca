"""Rejection sampling: which responses of a round are learned from.

Samples are grouped by draw: a prompt that is drawn twice in a step has two groups, each with a best response.
"""

from fractions import Fraction
from math import ceil

import numpy as np

from c2f_ray.data.trajectory import Float32, Int64


def best_of_draw(draw: Int64, reward: Float32, seed: list[int]) -> Int64:
    """Returns the index of each draw's response with the highest reward, by draw; ties are broken by ``seed``.

    ``draw`` [N] is the number of the sample's prompt among those of the step, and ``reward`` [N] of all responses.
    """
    shuffled = np.random.default_rng(seed).permutation(len(reward))
    ranked = shuffled[np.lexsort((-reward[shuffled], draw[shuffled]))]
    _, first = np.unique(draw[ranked], return_index=True)
    return ranked[first]


def select(draw: Int64, reward: Float32, seed: list[int], min_margin: float | None, top_fraction: float) -> Int64:
    """Returns the indices of the responses to learn from, ascending; at least one.

    Of each draw the best; with ``min_margin`` only where it exceeds the mean of its draw's rewards by so much; and of
    these the ``top_fraction`` with the highest rewards. Where none has the margin, the one with the largest is kept.
    Margins are computed in float64, in which the mean of equal float32 rewards is exact.
    """
    best = best_of_draw(draw, reward, seed)
    if min_margin is not None:
        exact = reward.astype(np.float64)
        numbers, group = np.unique(draw, return_inverse=True)
        means = np.bincount(group, weights=exact) / np.bincount(group)
        margin = exact[best] - means[np.searchsorted(numbers, draw[best])]
        enough = margin >= min_margin
        best = best[enough] if enough.any() else best[[int(margin.argmax())]]
    count = max(1, fraction_of(top_fraction, len(best)))
    return np.sort(best[np.argsort(-reward[best], kind="stable")[:count]])


def fraction_of(fraction: float, count: int) -> int:
    """Returns a decimal fraction of a count, rounded up; 0.07 of 100 is 7, where floating point would give 8."""
    return ceil(Fraction(str(fraction)) * count)
