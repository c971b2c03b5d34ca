"""How far two float32 computations of the same number may lie apart when their kernels sum in different orders.

The kernels depend on the CPU: `ATEN_CPU_CAPABILITY=default` or `avx2` imitates older ones. A tolerance is the unit of
float32 times the size of what is summed, so it also holds on CPUs that nobody has tried.
"""

from collections.abc import Sequence

import numpy as np

UNIT = float(np.finfo(np.float32).eps)  # 1.2e-7
# Logits of the tiny models reach 16 in size, after sums of 128 terms in each of three layers: a few units of 16 each.
LOGPROB = 4 * 16 * UNIT
# A score is a sum of 128 products of order 1, of hidden states that are as exact as the logits'.
SCORE = 4 * 16 * UNIT


def sum_of_logprobs(counts: int | Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns the tolerance of sums of so many logprobs: their errors may all have one sign."""
    return np.asarray(counts) * LOGPROB


def mean_of_products(factors: np.ndarray | Sequence[float]) -> float:
    """Returns the tolerance of a mean of logprobs times these factors, which may cancel in the mean."""
    return float(np.abs(np.asarray(factors)).mean()) * LOGPROB
