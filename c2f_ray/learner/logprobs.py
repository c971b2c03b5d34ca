"""Log probabilities of response tokens from a Hugging Face causal LM, at a bounded cost in memory.

Invariant: logits exist for ``CHUNK_TOKENS`` tokens at a time, forward and backward, and for response tokens only.
A 128k vocabulary and 16k tokens would take 8 GiB in float32 otherwise, and twice that with their gradient.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

CHUNK_TOKENS = 1024

# Settings by which some architectures change the logits after the output layer, with the value that means "not at all".
LOGIT_SETTINGS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}


class ResponseLogprobs(nn.Module):
    """A causal LM whose forward gives the log probability of each response token instead of logits.

    It is a module so that DeepSpeed's hooks see its forward.
    """

    def __init__(self, model: PreTrainedModel, *, entropy_gradient: bool = False) -> None:
        super().__init__()
        for name, plain in LOGIT_SETTINGS.items():
            value = getattr(model.config, name, plain)
            if value != plain:
                raise ValueError(
                    f"{model.config.model_type}: the learner does not apply {name}={value} of the model's config"
                )
        output_layer = model.get_output_embeddings()
        assert output_layer is not None  # a causal LM has one
        self.model = model
        self.entropy_gradient = entropy_gradient
        # In a tuple it is not registered a second time: the parameters keep their names.
        self._output_layer = (output_layer,)

    def forward(
        self, input_ids: Tensor, predicts: Tensor, targets: Tensor, num_chunks: int, **packing: Any
    ) -> tuple[Tensor, Tensor]:
        """``(logprobs, entropy)``, float32 [R], in nats; ``entropy`` has a gradient if it was asked for.

        ``input_ids`` int64 [B, S]: padded at the right, where a causal model cannot see it, so no attention mask.
        ``predicts`` bool [B, S]: the R positions whose next token is a response token.
        ``targets`` int64 [R]: these tokens, in row-major order.
        ``num_chunks``: ``chunks_for(R)`` or more. Under ZeRO-3 each chunk gathers the output layer, so ranks that
        run together must agree on it; it may exceed R.
        ``packing``: where the rows are one after the other in one, what ``packing.layout`` says of them.
        """
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False, **packing).last_hidden_state[predicts]
        parts = [
            checkpoint(_logprobs, part, self._output_layer[0], target, self.entropy_gradient, use_reentrant=False)
            for part, target in zip(hidden.tensor_split(num_chunks), targets.tensor_split(num_chunks), strict=True)
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def chunks_for(num_tokens: int) -> int:
    return max(1, math.ceil(num_tokens / CHUNK_TOKENS))


def _logprobs(
    hidden: Tensor, output_layer: nn.Module, targets: Tensor, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    logprobs = log_softmax(output_layer(hidden).float(), dim=-1)
    # Taken before the entropy: what follows the last tensor that backward needs is not computed again for it.
    found = logprobs.gather(-1, targets[:, None]).squeeze(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return found, entropy
