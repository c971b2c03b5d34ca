"""Pairwise win rates: two models' answers to the same prompts, each pair judged in both orders. Pure.

The count is that of AlpacaEval (a win is 1, a tie 0.5) with the two orders of MT-Bench (arXiv 2306.05685, section 3.4)
averaged, so that a judge who prefers a place gives no model an advantage.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np

from c2f_ray.evaluation.judge import letter

POINTS = {"A": 1.0, "C": 0.5, "B": 0.0}  # of the answer in the first place
RESAMPLES = 10_000
CHUNK = 100  # resamples in memory at the same time
INTERVAL = (0.025, 0.975)


def judged_points(as_first: str, as_second: str) -> float | None:
    """A model's points in one pair, from the verdicts on its answer in the first and in the second place.

    None where one of the two is no verdict: the other alone would favour a place.
    """
    first, second = letter(as_first), letter(as_second)
    if first is None or second is None:
        return None
    return (POINTS[first] + 1 - POINTS[second]) / 2


def reward_points(own: float, other: float) -> float:
    return 1.0 if own > other else 0.0 if own < other else 0.5


def win_rate(points: Sequence[float | None], seed: int) -> dict[str, Any]:
    """The mean of the points that there are, with its 95% bootstrap percentile interval over prompts (Efron 1979).

    A pair is won with more than half a point and lost with less. `left_out` counts the pairs without points. Two sides
    swapped give 1 - mean and, with the same seed, the mirrored interval.
    """
    present = np.array([value for value in points if value is not None])
    result: dict[str, Any] = {"win_rate": None, "low": None, "high": None}
    if len(present):
        rng = np.random.default_rng(seed)
        drawn = (rng.integers(0, len(present), (CHUNK, len(present))) for _ in range(RESAMPLES // CHUNK))
        low, high = np.quantile(np.concatenate([present[rows].mean(axis=1) for rows in drawn]), INTERVAL)
        result = {"win_rate": float(present.mean()), "low": float(low), "high": float(high)}
    return {
        **result,
        "wins": int((present > 0.5).sum()),
        "ties": int((present == 0.5).sum()),
        "losses": int((present < 0.5).sum()),
        "left_out": len(points) - len(present),
    }


def mean_characters(answers: Sequence[str]) -> float:
    return fmean(len(answer) for answer in answers)
