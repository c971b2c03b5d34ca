"""Tokenizers, loaded once in each process."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase


@lru_cache(maxsize=8)
def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or of a model on the hub."""
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def decode(tokenizer: PreTrainedTokenizerBase, ids: NDArray[np.generic], *, special: bool) -> str:
    """The text of one row of token ids, with its special tokens or without."""
    text = tokenizer.decode(ids, skip_special_tokens=not special)
    assert isinstance(text, str)
    return text
