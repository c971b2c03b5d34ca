"""Packed sequences against the same sequences padded, and what cannot be packed."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, Qwen3NextConfig

from c2f_ray.learner.logprobs import ResponseLogprobs
from c2f_ray.learner.packing import PACKED, layout, obstacle
from c2f_ray.learner.values import ResponseValues

LENGTHS = torch.tensor([9, 1, 6, 12])


def model(attention: str, sliding_window: int | None):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, sliding_window=sliding_window, initializer_range=0.2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).double()


@pytest.mark.parametrize("sliding_window", [None, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_equals_padded(sliding_window, checkpointing):
    """Logprobs, values and gradients in float64; the window is shorter than two of the sequences."""
    real = torch.arange(12) < LENGTHS[:, None]
    padded = torch.randint(3, 97, real.shape) * real
    predicts = (torch.arange(12) < LENGTHS[:, None] - 1) & (torch.arange(12) > 0)
    targets = padded.roll(-1, 1)[predicts]
    inputs = {"sdpa": (padded, predicts), PACKED: (padded[real][None], predicts[real][None])}
    found = {}
    for attention, (input_ids, wanted) in inputs.items():
        packing = layout(LENGTHS) if attention == PACKED else {}
        policy = ResponseLogprobs(model(attention, sliding_window)).train()
        critic = ResponseValues(policy.model.model, torch.linspace(-1, 1, 32)[None])
        if checkpointing:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        logprobs, _ = policy(input_ids, wanted, targets, 2, **packing)
        values = critic(input_ids, wanted, **packing)
        (logprobs * values.detach() + values.square()).sum().backward()
        gradients = {name: parameter.grad for name, parameter in policy.model.named_parameters()}
        found[attention] = {"logprobs": logprobs, "values": values, **gradients}
    # The log-softmax and the value head round to float32.
    torch.testing.assert_close(found[PACKED], found["sdpa"], rtol=1e-6, atol=1e-6)


def test_what_cannot_be_packed_is_named():
    assert obstacle(MistralConfig(sliding_window=4096)) is None
    assert obstacle(LlamaConfig()) is None
    assert obstacle(Gemma2Config()) == "attn_logit_softcapping"
    assert obstacle(Qwen3NextConfig()) == "layers of type linear_attention"
    assert obstacle(LlamaConfig(head_dim=512)) == "attention heads of 512, more than 256,"
    assert obstacle(GPT2Config()) is None
