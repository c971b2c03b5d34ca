"""The UltraRM worker against a direct forward of the same checkpoint, written here anew."""

from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaModel

from c2f_ray.data.prompts import PromptSet
from c2f_ray.data.trajectory import Ragged, Trajectories, TrajectoryInfo
from c2f_ray.recipe.schema import Cluster, UltraRMReward
from c2f_ray.reward.function import Sample
from c2f_ray.reward.pool import RewardPool
from c2f_ray.reward.ultrarm import UltraRMScorer, load_ultrarm, render_ultrarm

PROMPT = "b=c,a=2,f=e,e=a,c=3,d=f,b?"
RESPONSES = ["so 3", "b=c\nc=3\nso 3", "b=c\nc=3\nso 3\ncheck\nb=c\nc=3\nso 3\n" * 5, "so 2\n"]


def settings(world: Path, **changes) -> UltraRMReward:
    values = {"gpus_per_worker": 0, "dtype": "float32", "tokens_per_batch": 256, "max_tokens": 256, "timeout_s": 60.0}
    return UltraRMReward(kind="ultrarm", model=str(world / "reward"), **{**values, **changes})


def direct_score(folder: Path, text: str, eos: bool) -> float:
    """UltraRM by its definition: the head on the final-normed hidden state of the last token, one text at a time."""
    weights = load_file(folder / "model.safetensors")
    model = LlamaModel(LlamaConfig.from_pretrained(folder)).eval()
    model.load_state_dict({key.removeprefix("model."): w for key, w in weights.items() if key.startswith("model.")})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * eos
    with torch.no_grad():
        hidden = model(torch.tensor([ids])).last_hidden_state[0, -1]
    return float(weights["regression_head.weight"][0] @ hidden)


def shard(world: Path, finished: list[bool]) -> Trajectories:
    """The responses as the policy's own tokens; a finished one ends with the policy's end-of-text token."""
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    ends = [[tokenizer.eos_token_id] if end else [] for end in finished]
    rows = [tokenizer(text)["input_ids"] + end for text, end in zip(RESPONSES, ends, strict=True)]
    n = len(rows)
    response = Ragged.from_rows(rows, np.int32)
    info = TrajectoryInfo(
        sample_id=np.arange(n),
        prompt_row=np.zeros(n, np.int64),
        greedy=np.zeros(n, bool),
        finished=np.array(finished),
        prompt_tokens=np.ones(n, np.int32),
        response_tokens=response.lengths.astype(np.int32),
        weight_version=np.zeros(n, np.int32),
    )
    return Trajectories(info, Ragged.from_rows([[1]] * n, np.int32), response, Ragged.from_rows([[]] * n, np.float32))


def test_scores_equal_a_direct_forward(world: Path, cluster: None):
    """From a worker, and from the scorer for mixed lengths in one batch and one at a time: to 1e-5.

    The policy's end-of-text never leaks; a truncated response gets no `</s>`, a finished one does.
    """
    finished = [True, False, True, False]
    expected = [
        direct_score(world / "reward", f"Human: {PROMPT}\nAssistant: {text}", eos)
        for text, eos in zip(RESPONSES, finished, strict=True)
    ]
    assert np.ptp(expected) > 1e-3, "a reward that is the same for all responses would prove nothing"
    messages = [{"role": "user", "content": PROMPT}]
    samples = [Sample(messages, text, end, {}) for text, end in zip(RESPONSES, finished, strict=True)]
    for budget in (4096, 256, 1):
        scores = UltraRMScorer(settings(world, tokens_per_batch=budget)).score(samples)
        np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=0)

    prompts = PromptSet(["p"], [messages], [{}], Ragged.from_rows([[1]], np.int32), 0)
    pool = RewardPool(settings(world), Cluster(), str(world / "base"), ray.put(prompts))
    whole = shard(world, finished)
    scores = pool.collect([pool.submit(ray.put(part)) for part in (whole, whole.select(np.array([2])))])
    pool.close()
    np.testing.assert_allclose(scores[0], expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(scores[1], expected[2:3], atol=1e-5, rtol=0)


def test_the_template_joins_turns_and_gives_a_system_message_to_the_first_human():
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a: b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    assert render_ultrarm(messages, "e", "\n") == "Human: s\na: b\nAssistant: c\nHuman: d\nAssistant: e"
    assert render_ultrarm(messages[1:], "e", "\n\n") == "Human: a: b\n\nAssistant: c\n\nHuman: d\n\nAssistant: e"


@pytest.mark.parametrize("key", ["regression_head.weight", "model.norm.weight"])
def test_a_missing_key_is_named(world: Path, tmp_path: Path, key: str):
    for file in (world / "reward").glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(world / "reward" / "model.safetensors")
    del weights[key]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=key):
        load_ultrarm(str(tmp_path), torch.float32)
