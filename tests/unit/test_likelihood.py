"""Perplexity and KL against the definitions, on models small enough to hold all their logits."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from c2f_ray.data.trajectory import Ragged, Trajectories, TrajectoryInfo
from c2f_ray.evaluation.likelihood import Forward, likelihoods, text_windows

VOCABULARY = 32


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two random models, and one whose every next token is as likely as any other."""
    folders = {}
    for seed, name in enumerate(("one", "other", "uniform")):
        torch.manual_seed(seed)
        size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        # The other has more columns than there are tokens, as models padded for speed have.
        config = MistralConfig(
            vocab_size=VOCABULARY + 8 * (name == "other"), num_key_value_heads=1, initializer_range=0.5, **size
        )
        model = MistralForCausalLM(config)
        if name == "uniform":
            torch.nn.init.zeros_(model.lm_head.weight)
        folders[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(folders[name])
    return folders


def logprobs(folder: str, ids: list[int]) -> torch.Tensor:
    """Log probabilities of every next token over the shared vocabulary, float64 [tokens, vocabulary]."""
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0]
    return torch.log_softmax(logits.double()[:, :VOCABULARY], dim=-1)


def test_perplexity_and_kl_are_those_of_the_definitions(models: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    """Over texts and responses of different lengths, in batches of a few rows and chunks of three tokens."""
    monkeypatch.setattr("c2f_ray.evaluation.likelihood.wait_for", lambda refs, *_: refs)
    monkeypatch.setattr("c2f_ray.evaluation.likelihood.chunks_for", lambda count: math.ceil(count / 3))
    rng = np.random.default_rng(0)
    texts, prompts, responses = (
        [rng.integers(0, VOCABULARY, length).tolist() for length in lengths]
        for lengths in ((2, 9, 5, 7), (3, 1, 6), (4, 8, 1))
    )
    surprises = [-logprobs(models["one"], text)[:-1].gather(1, torch.tensor(text[1:])[:, None]) for text in texts]
    divergences = []
    for prompt, response in zip(prompts, responses, strict=True):
        p, q = (logprobs(models[name], prompt + response)[len(prompt) - 1 : -1] for name in ("one", "other"))
        divergences.append((p.exp() * (p - q)).sum(1))
    assert sum(map(len, surprises)) == 19
    assert sum(map(len, divergences)) == 13

    n = len(prompts)
    zeros = np.zeros(n, np.int32)
    info = TrajectoryInfo(
        np.arange(n), np.arange(n), np.ones(n, bool), np.ones(n, bool), np.zeros(n, bool), zeros, zeros, zeros
    )
    shard = Trajectories(info, *(Ragged.from_rows(rows, np.int32) for rows in (prompts, responses, [[]] * n, [[]] * n)))
    shards = [shard.select(np.array([0, 1])), shard.select(np.array([2]))]
    windows = Ragged.from_rows(texts, np.int32)
    found = likelihoods(models["one"], models["other"], Forward("float32", 0, 14), windows, shards, 1.0)
    assert found["perplexity"] == pytest.approx(math.exp(torch.cat(surprises).mean()), rel=1e-5)
    assert found["kl_to_instruct"] == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-5)
    assert found["kl_to_instruct"] > 0.1

    uniform = likelihoods(models["uniform"], models["uniform"], Forward("float32", 0, 14), windows, shards, 1.0)
    assert uniform == {"perplexity": pytest.approx(VOCABULARY, rel=1e-6), "kl_to_instruct": 0.0}


def test_a_long_text_is_cut_into_windows_that_begin_anew():
    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    windows = text_windows(tokenizer, ["abcdefg", "h", "ijk"], 3)
    assert ["".join(map(chr, windows[i])) for i in range(len(windows))] == ["abc", "def", "ijk"]
