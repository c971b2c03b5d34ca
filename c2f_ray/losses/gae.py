"""Generalised advantage estimation (arXiv 1506.02438, equation 16) for responses that end an episode.

Shapes: B samples, T the longest response. ``mask`` [B, T] is True on a sample's own response tokens, its
end-of-sequence token included, and starts at column 0; what lies outside the mask never matters.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

Whitening = Literal["none", "unbiased", "biased"]

BLOCK = 32  # tokens that one matrix product sums over; the fastest of 16 to 128 on a CPU, give or take noise


def advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """``A_t = sum_{s>=t} (gamma * lambda)^(s-t) * delta_s``, [B, T], zero outside the mask.

    ``delta_t = r_t + gamma * V_{t+1} - V_t``, with ``rewards`` [B, T] of each token and ``values`` [B, T] of the state
    before it. The value after the last token is 0, also where the response was cut by the limit. The critic's targets
    are ``A + V``.
    """
    values = values.masked_fill(~mask, 0.0)
    after = torch.cat([values[:, 1:], values.new_zeros(len(values), 1)], dim=1)
    delta = (rewards + gamma * after - values).masked_fill(~mask, 0.0)
    return discounted_from_here_on(delta, gamma * gae_lambda)


def discounted_from_here_on(values: Tensor, discount: float) -> Tensor:
    """``sum_{s>=t} discount^(s-t) * values_s`` along the last dimension of [B, T].

    Blocks of ``BLOCK`` tokens are summed by one matrix product, and what the blocks after one add to it is the same
    problem over the blocks' first tokens. More exact than the loop: each level adds up ``BLOCK`` products at most.
    """
    num_samples, num_tokens = values.shape
    if num_tokens <= BLOCK:
        return values @ _powers(num_tokens, discount, values)
    num_blocks = -(-num_tokens // BLOCK)
    padded = pad(values, (0, num_blocks * BLOCK - num_tokens))
    inside = padded.view(num_samples, num_blocks, BLOCK) @ _powers(BLOCK, discount, values)
    from_block = discounted_from_here_on(inside[:, :, 0], discount**BLOCK)
    later = torch.cat([from_block[:, 1:], from_block.new_zeros(num_samples, 1)], dim=1)
    to_next_block = _exponentiate(discount, torch.arange(BLOCK, 0, -1, device=values.device)).to(values.dtype)
    inside += later[:, :, None] * to_next_block
    return inside.view(num_samples, -1)[:, :num_tokens]


def _powers(size: int, discount: float, like: Tensor) -> Tensor:
    """[size, size] with ``discount^(s-t)`` in row s and column t, zero where s < t."""
    position = torch.arange(size, device=like.device)
    return _exponentiate(discount, position[:, None] - position).tril().to(like.dtype)


def _exponentiate(discount: float, exponents: Tensor) -> Tensor:
    """In float64, so that a long response's discount is as exact as its rewards; negative exponents give 1."""
    return torch.tensor(discount, dtype=torch.float64, device=exponents.device) ** exponents.clamp(min=0)


def whiten(values: Tensor, how: Whitening) -> Tensor:
    """Returns ``(values - mean) / sqrt(variance + 1e-8)`` over all elements, computed in float64; 0 for a single one.

    ``unbiased`` divides the variance by n - 1 (TRL, verl and NeMo do), ``biased`` by n (OpenRLHF does).
    """
    if how == "none":
        return values
    if values.numel() == 1:
        return torch.zeros_like(values)
    exact = values.double()  # a 0-dim mean would be rounded to the values' own dtype before the subtraction
    variance, mean = torch.var_mean(exact, correction=1 if how == "unbiased" else 0)
    return ((exact - mean) * torch.rsqrt(variance + 1e-8)).to(values.dtype)
