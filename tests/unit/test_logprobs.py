"""Chunked response logprobs against the plain computation over whole logits."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from c2f_ray.learner.logprobs import ResponseLogprobs, chunks_for


def tiny_mistral():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return MistralForCausalLM(config)


def plain(model, rows):
    """One sequence at a time, without padding, float64 softmax: (logprobs, entropy) of each response token."""
    logprobs, entropy = [], []
    for prompt, response in rows:
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
        every = logits.log_softmax(-1)
        logprobs.append(every[torch.arange(len(response)), torch.tensor(response)])
        entropy.append(-(every.exp() * every).sum(-1))
    return torch.cat(logprobs), torch.cat(entropy)


@pytest.mark.parametrize("num_chunks", [1, 3, 11])
def test_values_and_gradients_equal_the_plain_ones(num_chunks):
    """Of 8 response tokens: in one chunk, in chunks of 3, 3 and 2, and in 8 chunks of one and 3 empty ones."""
    model = tiny_mistral()
    rows = [([5, 6, 7], [8, 9, 10, 11, 2]), ([4], [96, 3]), ([1, 2], [50])]
    length = max(len(prompt + response) for prompt, response in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    predicts = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, (prompt, response) in enumerate(rows):
        input_ids[i, : len(prompt + response)] = torch.tensor(prompt + response)
        predicts[i, len(prompt) - 1 : len(prompt + response) - 1] = True
    targets = torch.tensor([token for _, response in rows for token in response])
    weights = torch.linspace(-1, 1, len(targets), dtype=torch.float64)

    expected, expected_entropy = plain(model, rows)
    (expected * weights).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    logprobs, entropy = ResponseLogprobs(model)(input_ids, predicts, targets, num_chunks)
    (logprobs * weights).sum().backward()

    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=0, atol=1e-6)
    assert not entropy.requires_grad
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_entropys_gradient_is_there_when_asked_for():
    model = tiny_mistral()
    expected = plain(model, [([5, 6, 7], [8, 9, 10, 11, 2])])[1]
    gradients = torch.autograd.grad(expected.sum(), list(model.parameters()))
    input_ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 2]])
    predicts = torch.tensor([[False, False, True, True, True, True, True, False]])
    _, entropy = ResponseLogprobs(model, entropy_gradient=True)(input_ids, predicts, input_ids[0, 3:], 2)
    found = torch.autograd.grad(entropy.sum(), list(model.parameters()))
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_logits_never_exist_for_more_than_a_chunk():
    assert [chunks_for(tokens) for tokens in (0, 1, 1024, 1025)] == [1, 1, 1, 2]
    model = tiny_mistral()
    sizes = []
    model.lm_head.register_forward_hook(lambda _, args, output: sizes.append(output.shape[0]))
    predicts = torch.ones(2, 5, dtype=torch.bool)
    logprobs, _ = ResponseLogprobs(model)(torch.ones(2, 5, dtype=torch.long), predicts, torch.arange(10), 3)
    logprobs.sum().backward()
    assert sorted(sizes) == [3, 3, 3, 3, 4, 4]  # each chunk forward, and again in the backward


def test_a_model_that_changes_its_logits_is_refused():
    config = Gemma2Config(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"gemma2: .*final_logit_softcapping=30.0"):
        ResponseLogprobs(Gemma2ForCausalLM(config))
