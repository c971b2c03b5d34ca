"""How far the policy is from its reference: three estimators, and a coefficient that seeks a target.

Elementwise over response tokens, which the policy sampled: ``d = log pi(a) - log pi_ref(a)``.
"""

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]

GAIN = 0.1  # arXiv 1909.08593, section 2.2: K_beta
MAX_ERROR = 0.2  # the same
MAX_K3 = 10.0  # nats of one token


def estimate(logprobs: Tensor, reference: Tensor, estimator: Estimator, clip: float) -> Tensor:
    """Per-token estimate of ``KL(pi || pi_ref)`` in nats (J. Schulman, "Approximating KL divergence", 2020).

    ``k1``: ``d``, unbiased, of either sign; ``k2``: ``d^2 / 2``, biased; ``k3``: ``exp(-d) - 1 + d``, unbiased and
    never negative. As a loss only their gradients count, and on the policy's own samples these are in expectation:
    zero for k1, the gradient of ``KL(pi || pi_ref)`` for k2, that of ``KL(pi_ref || pi)`` for k3.
    ``d`` is clipped to +- ``clip`` first (ours), and k3 is at most 10, as in verl and OpenRLHF: at d = -20 a single
    token would have a k3 of 4.85e8, beside which the advantages of all others vanish.
    """
    d = (logprobs - reference).clamp(-clip, clip)
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d * d
    return (torch.expm1(-d) + d).clamp(max=MAX_K3)


def next_coefficient(coefficient: float, kl: float, target: float) -> float:
    """The coefficient after a step whose responses had ``kl`` nats on average (arXiv 1909.08593, section 2.2).

    ``error = clip((kl - target) / target, +-0.2)``, ``coefficient * (1 + 0.1 * error)``: 2% a step at most.
    """
    error = min(max((kl - target) / target, -MAX_ERROR), MAX_ERROR)
    return coefficient * (1.0 + GAIN * error)
