"""ReMax (arXiv 2310.10505): REINFORCE with the greedy rollout's reward as the baseline; no critic, no ratio, no GAE.

Shapes: B samples, T the longest response. ``mask`` [B, T] is True on a sample's own response tokens, its
end-of-sequence token included, and starts at column 0; what lies outside the mask never matters.
"""

from typing import Literal

from torch import Tensor


def advantage(reward: Tensor, baseline: Tensor, clip: float) -> Tensor:
    """``clip(r - r_greedy, +-clip)``, [B]: clipped after the subtraction, as in the authors' code."""
    return (reward - baseline).clamp(-clip, clip)


def returns(
    advantages: Tensor,
    kl: Tensor,
    mask: Tensor,
    kl_penalty: Literal["full_step", "one_step"],
    kl_coefficient: float,
    gamma: float,
) -> Tensor:
    """Return of every response token, [B, T], zero outside the mask.

    ``advantages`` [B]; ``kl`` [B, T] is ``k_t = log pi(a_t) - log pi_ref(a_t)`` at rollout weights, without gradient.
    With t = 1..T, T the sample's own length, and b the KL coefficient, the two published conventions are

    ``full_step`` (the card of Mistral-7B-ReMax-v0.1): ``advantage - b * sum_{s>=t} k_s``, undiscounted;
    ``one_step`` (the 2023 repository): ``gamma^(T-t+1) * advantage - b * k_t``: even the last token gets one gamma.
    """
    kl = kl.masked_fill(~mask, 0.0)
    if kl_penalty == "full_step":
        returns = advantages[:, None] - kl_coefficient * from_here_on(kl)
    else:
        discount = gamma ** from_here_on(mask.to(kl.dtype))
        returns = discount * advantages[:, None] - kl_coefficient * kl
    return returns.masked_fill(~mask, 0.0)


def from_here_on(values: Tensor) -> Tensor:
    """``sum_{s>=t} values_s`` along the last dimension, [B, T]."""
    return values.flip(-1).cumsum(-1).flip(-1)


def loss(returns: Tensor, logprobs: Tensor, mask: Tensor, num_tokens: int) -> Tensor:
    """``sum(-return_t * log pi(a_t)) / num_tokens`` over the mask, a scalar; only ``logprobs`` [B, T] has a gradient.

    ``num_tokens`` is the sum of the whole update's masks, over all micro-batches and ranks, so that every token
    weighs the same however the batch was cut.
    """
    return -(returns.detach() * logprobs).masked_fill(~mask, 0.0).sum() / num_tokens
