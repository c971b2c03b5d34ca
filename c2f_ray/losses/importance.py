"""Truncated importance weights: rollouts by older weights, or by an engine that rounds differently, count for less.

The learner's policy at rollout time is ``pi``, the distribution that the engine sampled from is ``mu``.
"""

import math

from torch import Tensor


def weights(logprobs: Tensor, sampler_logprobs: Tensor, clip: float | None) -> Tensor:
    """``min(pi(a) / mu(a), clip)`` of each token, [R], without gradient; not truncated where ``clip`` is None.

    Truncation bounds the variance at the price of a bias (Ionides 2008, "Truncated importance sampling",
    equation 3); applied to each token, as here, it ignores how far the states themselves have drifted.
    """
    return (logprobs.detach() - sampler_logprobs).exp().clamp(max=math.inf if clip is None else clip)
