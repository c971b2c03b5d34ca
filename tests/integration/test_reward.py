"""The UltraRM worker against a direct forward of the same checkpoint, written here anew."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoTokenizer, LlamaConfig, LlamaModel

from c2f_ray.data.prompts import PromptSet
from c2f_ray.data.trajectory import Ragged, Trajectories, TrajectoryInfo
from c2f_ray.errors import RecipeError
from c2f_ray.recipe import Cluster, FunctionReward, UltraRMReward
from c2f_ray.recipe.roles import Scorer
from c2f_ray.reward.check import check_reward
from c2f_ray.reward.rewards import Rewards
from c2f_ray.reward.samples import Sample
from c2f_ray.reward.ultrarm import UltraRMScorer, load_ultrarm, render_ultrarm
from c2f_ray.reward.worker import RewardWorker
from tests.tolerances import SCORE

PROMPT = "b=c,a=2,f=e,e=a,c=3,d=f,b?"
RESPONSES = ["so 3", "b=c\nc=3\nso 3", "b=c\nc=3\nso 3\ncheck\nb=c\nc=3\nso 3\n" * 5, "so 2\n"]


def settings(world: Path, **changes) -> UltraRMReward:
    values = {"gpus_per_worker": 0, "dtype": "float32", "tokens_per_batch": 256, "max_tokens": 256, "timeout_s": 1800.0}
    return UltraRMReward(kind="ultrarm", model=str(world / "reward"), **{**values, **changes})


def direct_score(folder: Path, text: str, eos: bool) -> float:
    """UltraRM by its definition: the head on the final-normed hidden state of the last token, one text at a time."""
    weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    model = LlamaModel(LlamaConfig.from_pretrained(folder, dtype=torch.float32)).float().eval()
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
        interrupted=np.zeros(n, bool),
        prompt_tokens=np.ones(n, np.int32),
        response_tokens=response.lengths.astype(np.int32),
        weight_version=np.zeros(n, np.int32),
    )
    nothing = Ragged.from_rows([[]] * n, np.float32)
    return Trajectories(info, Ragged.from_rows([[1]] * n, np.int32), response, nothing, nothing)


def test_scores_equal_a_direct_forward(world: Path, cluster: None):
    """From workers, to 1e-6. The policy's end-of-text never leaks; only a finished response gets `</s>`."""
    finished = [True, False, True, False]
    expected = [
        direct_score(world / "reward", f"Human: {PROMPT}\nAssistant: {text}", eos)
        for text, eos in zip(RESPONSES, finished, strict=True)
    ]
    assert np.ptp(expected) > 1e-3, "a reward that is the same for all responses would prove nothing"
    messages = [{"role": "user", "content": PROMPT}]
    prompts = ray.put(PromptSet(["p"], [messages], [{}], Ragged.from_rows([[1]], np.int32), 0))
    reward = settings(world, truncation_penalty=0.5)
    rewards = Rewards(reward, Cluster(), str(world / "base"), prompts)
    parts = (shard(world, finished), shard(world, finished).select(np.array([2])))
    asked = [
        rewards.submit(ray.put(part), part.info.prompt_tokens + part.info.response_tokens, part.info.finished)
        for part in parts
    ]
    scored = rewards.collect(asked)
    rewards.close()
    penalty = 0.5 * ~np.array(finished)
    np.testing.assert_allclose(scored[0].rewards, expected - penalty, atol=SCORE, rtol=0)
    np.testing.assert_allclose(scored[1].rewards, expected[2:3], atol=SCORE, rtol=0)


@pytest.mark.parametrize("append_eos", ["finished", "always", "never"])
def test_one_and_many_padded_left_and_right(world: Path, append_eos: str):
    """To 1e-6: batches of one and of many, and the model's forward on both kinds of padding."""
    finished = [True, False, True, False]
    ends = {"finished": finished, "always": [True] * 4, "never": [False] * 4}[append_eos]
    expected = [
        direct_score(world / "reward", f"Human: {PROMPT}\nAssistant: {text}", eos)
        for text, eos in zip(RESPONSES, ends, strict=True)
    ]
    scorer = UltraRMScorer(settings(world, append_eos=append_eos))
    messages = [{"role": "user", "content": PROMPT}]
    encoded = [scorer.encode(Sample(messages, text, end, {})) for text, end in zip(RESPONSES, finished, strict=True)]
    np.testing.assert_allclose(scorer.score(encoded), expected, atol=SCORE, rtol=0)
    np.testing.assert_allclose([scorer.score([one])[0] for one in encoded], expected, atol=SCORE, rtol=0)
    longest = max(len(one.ids) for one in encoded)
    ids = torch.tensor([[0] * (longest - len(one.ids)) + one.ids for one in encoded])
    mask = torch.tensor([[0] * (longest - len(one.ids)) + [1] * len(one.ids) for one in encoded])
    with torch.no_grad():
        np.testing.assert_allclose(scorer.model(ids, mask), expected, atol=SCORE, rtol=0)


def test_no_special_token_leaks_into_the_conversation(world: Path, tmp_path: Path):
    """A policy whose template is full of special tokens, and a response that spells the reward model's own."""
    policy = AutoTokenizer.from_pretrained(world / "base")
    policy.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    policy.save_pretrained(tmp_path)
    own = [policy.convert_tokens_to_ids(token) for token in ("<|user|>", "<|assistant|>", policy.eos_token)]
    text = policy("so 3")["input_ids"]
    response = Ragged.from_rows([[own[0], *text, own[1], own[2]]], np.int32)
    info = shard(world, [True] * 4).info.select(np.array([0]))
    prompts = PromptSet(["p"], [[{"role": "user", "content": PROMPT}]], [{}], Ragged.from_rows([[1]], np.int32), 0)
    worker = RewardWorker(Scorer(settings(world)), str(tmp_path), prompts, ordered=True)
    scores, causes = worker.score(Trajectories(info, *[response] * 4), [0])
    assert causes == {}
    assert scores[0] == pytest.approx(
        direct_score(world / "reward", f"Human: {PROMPT}\nAssistant: so 3", True), abs=SCORE
    )
    spelled = UltraRMScorer(settings(world)).encode(
        Sample([{"role": "user", "content": "b?"}], "so 3</s>so 2<s>", False, {})
    )
    assert {1, 2} & set(spelled.ids[1:]) == set(), "an end of text inside the conversation"


def fake_slow_rollouts():
    """Forty shards of four samples, one every tenth of a second: an engine's pace."""
    for _ in range(40):
        time.sleep(0.1)
        yield [Sample([], "x", True, {})] * 4


def test_scores_are_ready_when_the_last_rollout_is(cluster: None):
    """Scoring takes six seconds where rollouts take four: two workers keep up, nine tenths are there at the end."""
    reward = FunctionReward(
        kind="function", function="tests.integration.faulty_rewards:slow", workers=2, timeout_s=1800.0
    )
    rewards = Rewards(reward, Cluster(), "", ray.put(None))
    rewards.wait_until_ready()
    asked = [rewards.submit(ray.put(shard), np.ones(4, np.int64), np.ones(4, bool)) for shard in fake_slow_rollouts()]
    ready = rewards.ready(asked)
    scored = rewards.collect(asked)
    rewards.close()
    assert ready >= 0.9
    assert np.concatenate([part.rewards for part in scored]).tolist() == [1.0] * 160


def test_a_failing_function_costs_its_own_samples_only(cluster: None, tmp_path: Path):
    """One in a hundred raises, hangs, ends the worker, gives NaN, a string or another count; one fails once."""
    faults = {7: "raises", 120: "hangs", 230: "nan", 333: "string", 450: "exits", 599: "count", 600: "once"}
    samples = [
        Sample([], "x" * (n % 13), True, {"fault": faults.get(n), "path": str(tmp_path / "once")}) for n in range(640)
    ]
    reward = FunctionReward(
        kind="function", function="tests.integration.faulty_rewards:score", workers=2, timeout_s=3.0, attempts=2
    )
    rewards = Rewards(reward, Cluster(max_restarts=0), "", ray.put(None))
    rewards.wait_until_ready()
    scored = rewards.collect(
        [
            rewards.submit(ray.put(samples[i : i + 20]), np.ones(20, np.int64), np.ones(20, bool))
            for i in range(0, 640, 20)
        ]
    )
    rewards.close()
    found = np.concatenate([part.rewards for part in scored])
    causes = {20 * i + row: cause for i, part in enumerate(scored) for row, cause in part.causes.items()}
    assert sorted(causes) == [7, 120, 230, 333, 450, 599]
    assert np.flatnonzero(np.isnan(found)).tolist() == sorted(causes)
    good = [n for n in range(640) if n not in causes]
    assert found[good].tolist() == [float(n % 13) for n in good]
    assert causes[7] == "reward function: attempt 2: KeyError: 'no such answer'"
    assert causes[120] == "reward function: attempt 2: the worker that scored it was lost: it gave no answer for 3 s"
    assert causes[230] == "reward function: attempt 2: the score is nan, not a finite number"
    assert causes[333] == "reward function: attempt 2: the score is 'good', not a finite number"
    assert "it died" in causes[450]
    assert causes[599].startswith("reward function: attempt 2: TypeError: returned 0 scores for 1 samples")
    assert all(part.drop is False for part in scored if part.causes)


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


@pytest.mark.parametrize(("append_eos", "count"), [("finished", 1), ("always", 1), ("never", 0)])
def test_as_many_end_tokens_as_the_recipe_says_whatever_the_tokenizer_adds(
    world: Path, tmp_path: Path, append_eos: str, count: int
):
    """A tokenizer whose post-processor appends an end-of-sequence token by itself; a cut keeps the first token."""
    shutil.copytree(world / "reward", tmp_path / "reward")
    tokenizer = AutoTokenizer.from_pretrained(world / "reward")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save_pretrained(tmp_path / "reward")
    assert AutoTokenizer.from_pretrained(tmp_path / "reward")("so 3")["input_ids"][-1] == 2
    reward = settings(tmp_path, append_eos=append_eos)
    sample = Sample([{"role": "user", "content": PROMPT}], "so 3", True, {})
    encoded = UltraRMScorer(reward).encode(sample)
    assert encoded.ids.count(2) == count
    assert encoded.ids[0] == 1
    cut = UltraRMScorer(reward.model_copy(update={"max_tokens": 6})).encode(sample)
    assert cut.ids == [1, *encoded.ids[-5:]]


def test_a_tokenizer_without_an_end_token_is_refused_before_the_start(world: Path, tmp_path: Path):
    shutil.copytree(world / "reward", tmp_path / "reward")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = tmp_path / "reward" / name
        if path.exists():
            content = json.loads(path.read_text())
            content.pop("eos_token", None)
            path.write_text(json.dumps(content))
    with pytest.raises(
        RecipeError, match="reward.append_eos: finished: the tokenizer of .* has no end-of-sequence token"
    ):
        check_reward(settings(tmp_path))
    check_reward(settings(tmp_path, append_eos="never"))
