"""Learning-rate schedules."""

import math

from c2f_ray.recipe import Optimizer


def lr_factor(optimizer: Optimizer, update: int, total_updates: int) -> float:
    """What ``optimizer.lr`` is multiplied with in update 0, 1, ..., ``total_updates - 1``.

    Warm-up is even and ends at 1 in its last update; after it ``linear`` and ``cosine`` fall from 1 in their first
    update towards 0, which they would reach one update after the run's last.
    """
    if update < optimizer.warmup_steps:
        return (update + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return 1.0
    done = (update - optimizer.warmup_steps) / max(1, total_updates - optimizer.warmup_steps)
    done = min(1.0, done)
    return 1.0 - done if optimizer.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
