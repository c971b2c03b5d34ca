"""transformers 5.19: what it has no public interface for."""

from typing import Any

from transformers import MODEL_MAPPING, PreTrainedConfig


def supports_other_attention(config: PreTrainedConfig) -> bool:
    """Returns whether models of this configuration can run an attention registered in `AttentionInterface`."""
    mapping: Any = MODEL_MAPPING  # pyrefly takes its values for tuples
    return mapping[type(config)]._supports_attention_backend
