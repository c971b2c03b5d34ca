"""The log-ratio reward of a Mixtral pair against a direct computation in float64."""

from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from transformers import AutoTokenizer, MixtralForCausalLM

from c2f_ray.recipe import Cluster, LogRatioReward
from c2f_ray.reward.log_ratio import encode
from c2f_ray.reward.rewards import Rewards
from c2f_ray.reward.samples import Sample
from c2f_ray.tiny.tokenizer import PAIR_TEMPLATE
from tests.tolerances import sum_of_logprobs

PROMPT = "b=c,a=2,f=e,e=a,c=3,d=f,b?"
MESSAGES = [{"role": "user", "content": PROMPT}]
RESPONSES = ["so 3", "b=c\nc=3\nso 3", "b=c\nc=3\nso 2", "b=c\nc=3\nso 3\ncheck\n" * 4, "so 2\n", ""]
FINISHED = [True, True, True, False, False, True]
LONGEST_TOKENS = 128  # more than any of them has
SAMPLES = [Sample(MESSAGES, text, end, {}) for text, end in zip(RESPONSES, FINISHED, strict=True)]


def settings(world: Path, **changes) -> LogRatioReward:
    return LogRatioReward(
        kind="log_ratio", policy_model=str(world / "pair_policy"), reference_model=str(world / "pair_reference"),
        gpus_per_worker=0, dtype="float32", tokens_per_batch=1024, max_tokens=240, memory=0.1, timeout_s=1800.0,
        **changes,
    )  # fmt: skip


def direct(folder: Path) -> list[float]:
    """sum_t log pi(y_t), with a whole softmax in float64, one conversation at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()
    found = []
    for text, end in zip(RESPONSES, FINISHED, strict=True):
        prompt = tokenizer(f"<s>Human: {PROMPT}\nAssistant: ", add_special_tokens=False)["input_ids"]
        response = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * end
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        found.append(sum(logprobs[len(prompt) + i - 1, token].item() for i, token in enumerate(response)))
    return found


@pytest.fixture(scope="module")
def scored(world: Path, cluster: None) -> dict[str, np.ndarray]:
    """The scores of all responses, and of the fourth alone."""
    rewards = Rewards(settings(world), Cluster(), "", ray.put(None))
    rewards.wait_until_ready()
    shards = [SAMPLES, [SAMPLES[3]]]
    asked = [
        rewards.submit(ray.put(shard), np.full(len(shard), 40), np.array([sample.finished for sample in shard]))
        for shard in shards
    ]
    whole, alone = rewards.collect(asked)
    rewards.close()
    return {"reward": whole.rewards, "alone": alone.rewards, **whole.parts}


def test_the_ratio_is_the_direct_computations(world: Path, scored: dict[str, np.ndarray]):
    policy, reference = np.array(direct(world / "pair_policy")), np.array(direct(world / "pair_reference"))
    assert np.abs(policy - reference).min() > 1e-3, "two models that agree would prove nothing"
    encoded = [encode(settings(world), *pair(world), sample) for sample in SAMPLES]
    tolerance = sum_of_logprobs([len(each.ids) - each.response_start for each in encoded])
    assert (np.abs(scored["log_ratio_policy"] - policy) <= tolerance).all()
    assert (np.abs(scored["log_ratio_reference"] - reference) <= tolerance).all()
    assert (np.abs(scored["reward"] - (policy - reference)) <= 2 * tolerance).all()
    assert (np.abs(policy - reference) > 10 * tolerance).all(), "so the comparison means something"


def test_batching_does_not_change_a_score(scored: dict[str, np.ndarray]):
    assert abs(scored["alone"][0] - scored["reward"][3]) <= sum_of_logprobs(LONGEST_TOKENS)


def test_the_sum_grows_with_length_and_the_mean_does_not(world: Path, scored: dict[str, np.ndarray]):
    """On the direct computation's own numbers, which the scorer has been shown to give: see the first test."""
    tokens = [len(encode(settings(world), *pair(world), sample).ids) for sample in SAMPLES]
    starts = [encode(settings(world), *pair(world), sample).response_start for sample in SAMPLES]
    lengths = np.array(tokens) - np.array(starts)
    short, long = 1, 3
    assert lengths[long] > 4 * lengths[short]
    sums = scored["log_ratio_policy"]
    assert sums[long] < 3 * sums[short] < 0
    means = sums / lengths
    assert abs(means[long]) < 3 * abs(means[short])


def pair(world: Path):
    tokenizer = AutoTokenizer.from_pretrained(world / "pair_policy")
    return tokenizer, tokenizer.chat_template


def test_what_is_scored_is_the_response_with_its_end(world: Path):
    tokenizer, template = pair(world)
    assert template == PAIR_TEMPLATE
    encoded = encode(settings(world), tokenizer, template, SAMPLES[1])
    assert tokenizer.decode(encoded.ids[: encoded.response_start]) == f"<s>Human: {PROMPT}\nAssistant: "
    assert tokenizer.decode(encoded.ids[encoded.response_start :]) == "b=c\nc=3\nso 3</s>"
    cut = encode(settings(world), tokenizer, template, SAMPLES[3])
    assert cut.ids[-1] != tokenizer.eos_token_id
    never = encode(settings(world, append_eos="never"), tokenizer, template, SAMPLES[1])
    assert never.ids == encoded.ids[:-1]
    spelled = encode(settings(world), tokenizer, template, Sample(MESSAGES, "so 3</s>so 2", True, {}))
    assert spelled.ids[spelled.response_start :].count(tokenizer.eos_token_id) == 1, "only the one at the end"
    short = settings(world).model_copy(update={"max_tokens": 4})
    last = encode(short, tokenizer, template, SAMPLES[1])
    assert (last.ids, last.response_start) == ([encoded.ids[0], *encoded.ids[-3:]], 1), "the first token stays"
