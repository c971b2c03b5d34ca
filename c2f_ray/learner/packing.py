"""Sequences one after the other in one row, without padding, and the attention that keeps them apart.

A transformer whose attention is ``PACKED`` takes ``layout(lengths)`` as keyword arguments beside its input ids; their
names are transformers' own. transformers makes no mask for an attention that it does not know.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig

from c2f_ray.adapters.transformers import supports_other_attention

PACKED = "packed"
MAX_HEAD_SIZE = 256  # of flash attention


def layout(lengths: Tensor) -> dict[str, Any]:
    """For sequences of ``lengths`` int64 [B]: positions that restart, [1, sum], and where sequences begin, [B + 1]."""
    ends = pad(lengths.cumsum(0), (1, 0))
    return {
        "position_ids": (torch.arange(int(ends[-1])) - ends[:-1].repeat_interleave(lengths))[None],
        "cu_seq_lens_q": ends.to(torch.int32),
        "max_length_q": int(lengths.max()),
    }


def obstacle(config: PreTrainedConfig) -> str | None:
    """What of a model's configuration packing cannot express, or flash attention lacks; None where there is nothing."""
    others = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if others:
        return f"layers of type {sorted(others)[0]}"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "attn_logit_softcapping"
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_size > MAX_HEAD_SIZE:
        return f"attention heads of {head_size}, more than {MAX_HEAD_SIZE},"
    if not supports_other_attention(config):
        return "an attention that transformers does not let others replace"
    return None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence; ``query`` [1, heads, total, size], result [1, total, heads, size].

    ``sliding_window``: tokens that one sees, itself included. The flash kernel has no float32; that, and the CPU,
    take the sequences one by one.
    """
    assert attention_mask is None and dropout == 0
    assert others.get("softcap") is None and others.get("s_aux") is None  # the others only tell positions
    if query.is_cuda and query.dtype != torch.float32:
        found = varlen_attn(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            # How far a token sees to its left (-1: to the first) and to its right.
            window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
            enable_gqa=True,
        )
        assert isinstance(found, Tensor)  # nothing else was asked for
        return found[None], None
    parts = []
    for start, end in cu_seq_lens_q.unfold(0, 2, 1).tolist():
        mask = None
        if sliding_window is not None and end - start > sliding_window:
            mask = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device).tril()
            mask = mask.triu(1 - sliding_window)
        found = scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=True,
        )
        parts.append(found)
    return torch.cat(parts, dim=2).transpose(1, 2), None


AttentionInterface.register(PACKED, _attention)
