"""Running mean and variance of all values seen so far."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_VARIANCE = 1e-8


@dataclass(frozen=True)
class Moments:
    """What a checkpoint keeps; all JSON numbers."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared differences from the mean

    def add(self, values: NDArray[np.floating]) -> "Moments":
        """With ``values`` [N] as well (Chan, Golub and LeVeque 1979, equation 2.1)."""
        values = np.asarray(values, np.float64)
        count, delta = self.count + len(values), float(values.mean()) - self.mean
        squares = self.squares + float(np.square(values - values.mean()).sum())
        squares += delta * delta * self.count * len(values) / count
        return Moments(count, self.mean + delta * len(values) / count, squares)

    def standardise(self, values: NDArray[np.floating]) -> NDArray[np.float32]:
        """``(values - mean) / standard deviation``, the population's; equal values only become 0."""
        deviation = math.sqrt(max(self.squares / self.count, MIN_VARIANCE))
        return ((np.asarray(values, np.float64) - self.mean) / deviation).astype(np.float32)
