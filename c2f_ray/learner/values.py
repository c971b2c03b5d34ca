"""The critic: a value for the state before each response token, from a transformer with a linear head."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel


class ValueHead(nn.Linear):
    """In float32 whatever the model's dtype: bfloat16 would round a value to 3 digits."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input.float(), self.weight.float())


class ResponseValues(nn.Module):
    """A transformer without output layer, whose forward gives one value for each response token.

    It is a module so that DeepSpeed's hooks see its forward.
    """

    def __init__(self, model: PreTrainedModel, head: Tensor | None) -> None:
        """``head`` [1, hidden]: the weights to start from; zero, so that all values are 0 at first, where None."""
        super().__init__()
        self.model = model
        self.head = ValueHead(model.config.hidden_size, 1, bias=False, dtype=model.dtype)
        with torch.no_grad():
            self.head.weight.zero_() if head is None else self.head.weight.copy_(head)

    def forward(self, input_ids: Tensor, predicts: Tensor, **packing: Any) -> Tensor:
        """Values, float32 [R].

        ``input_ids`` int64 [B, S]: padded at the right, where a causal model cannot see it, so no attention mask.
        ``predicts`` bool [B, S]: the R positions whose next token is a response token; a value's state ends there.
        ``packing``: where the rows are one after the other in one, what ``packing.layout`` says of them.
        """
        hidden = self.model(input_ids=input_ids, use_cache=False, **packing).last_hidden_state[predicts]
        return self.head(hidden).squeeze(-1)
