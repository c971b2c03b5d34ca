"""PPO's losses (arXiv 1707.06347) of single tokens, and the reward that a response's tokens share.

Elementwise: R response tokens. A loss is the token's own, neither summed nor averaged: the caller divides by the
tokens of the whole minibatch, over all micro-batches and ranks, so that every token weighs the same.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def token_rewards(scores: Tensor, penalty: Tensor, mask: Tensor) -> Tensor:
    """[B, T]: minus ``penalty`` [B, T] on every response token, plus ``scores`` [B] on the last (arXiv 1909.08593)."""
    is_last = torch.arange(mask.shape[-1], device=mask.device) == mask.sum(-1, keepdim=True) - 1
    return torch.where(is_last, scores[:, None], 0.0) - penalty.masked_fill(~mask, 0.0)


@dataclass(frozen=True)
class PolicyLoss:
    """All [R]; only ``loss`` has a gradient."""

    loss: Tensor
    clipped: Tensor  # bool: the clip holds the ratio, so the token has no gradient
    dual_clipped: Tensor  # bool: the second clip does
    approx_kl: Tensor  # nats, KL(old || new) by the k3 estimator


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_ratio: float,
    dual_clip: float | None,
    log_ratio_clip: float,
) -> PolicyLoss:
    """``max(-A * ratio, -A * clip(ratio, 1 +- clip_ratio))`` with ``ratio = exp(clip(new - old, +-log_ratio_clip))``.

    With ``dual_clip`` c, a loss is at most ``-A * c`` where A is negative (arXiv 1912.09729, equation 5).
    """
    log_ratio = (logprobs - old_logprobs).clamp(-log_ratio_clip, log_ratio_clip)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    held = -advantages * ratio.clamp(1.0 - clip_ratio, 1.0 + clip_ratio)
    loss = torch.maximum(plain, held)
    clipped = held > plain
    dual_clipped = torch.zeros_like(clipped)
    if dual_clip is not None:
        bound = -advantages * dual_clip
        dual_clipped = (advantages < 0) & (loss > bound)
        loss = torch.where(dual_clipped, bound, loss)
    with torch.no_grad():
        approx_kl = torch.expm1(log_ratio) - log_ratio
    return PolicyLoss(loss, clipped, dual_clipped, approx_kl)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, value_clip: float | None) -> tuple[Tensor, Tensor]:
    """``0.5 * max((V - G)^2, (clip(V, V_old +- value_clip) - G)^2)``, and where the clip holds it, bool; [R] each.

    The clipped form is that of OpenAI's baselines, not of the paper. Without ``value_clip`` it is the first term.
    """
    plain = (values - returns).square()
    if value_clip is None:
        return 0.5 * plain, torch.zeros_like(plain, dtype=torch.bool)
    near = values.clamp(old_values - value_clip, old_values + value_clip)
    held = (near - returns).square()
    return 0.5 * torch.maximum(plain, held), held > plain


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """``1 - var(returns - values) / var(returns)``: 1 is a perfect critic, 0 one that knows the mean only."""
    return float(1.0 - (returns - values).double().var() / returns.double().var())
