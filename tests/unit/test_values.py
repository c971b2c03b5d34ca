"""The critic's values against the plain computation, and where its head comes from."""

import torch
from transformers import MistralConfig, MistralModel

from c2f_ray.learner.values import ResponseValues


def trunk(dtype: torch.dtype = torch.float32) -> MistralModel:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return MistralModel(config).to(dtype)


def test_a_value_is_that_of_the_state_before_its_token():
    model, head = trunk(), torch.linspace(-1, 1, 32)[None]
    input_ids = torch.tensor([[5, 6, 7, 8, 2], [4, 9, 2, 0, 0]])  # responses 7 8 2 and 9 2
    predicts = torch.tensor([[False, True, True, True, False], [True, True, False, False, False]])
    found = ResponseValues(model, head)(input_ids, predicts)
    states = [[5, 6], [5, 6, 7], [5, 6, 7, 8], [4], [4, 9]]  # each by itself, so none has seen what comes after
    expected = [model(torch.tensor([state])).last_hidden_state[0, -1] @ head[0] for state in states]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-5)
    assert ResponseValues(model, None)(input_ids, predicts).tolist() == [0.0] * 5


def test_a_bfloat16_critic_has_values_between_those_of_bfloat16():
    model = ResponseValues(trunk(torch.bfloat16), torch.full((1, 32), 0.25))
    predicts = torch.ones(1, 40, dtype=torch.bool)
    values = model(torch.arange(40)[None], predicts)
    assert values.dtype == torch.float32
    assert (values != values.bfloat16().float()).any()
