"""Two tokenizers that disagree on every id, and a reward folder laid out as UltraRM-13b's."""

import dataclasses
import json
import random

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, LlamaModel

from c2f_ray.tiny import models, task
from c2f_ray.tiny.settings import CHAT_TEMPLATE, Settings
from c2f_ray.tiny.tokenizer import policy_tokenizer, reward_text, reward_tokenizer

SMALL = dataclasses.replace(Settings(), hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2)
CONTENT = "b=c,a=2,f=e,e=a,c=3,d=f,b?"


def test_round_trips_are_exact():
    rng = random.Random(0)
    policy, reward = policy_tokenizer(True), reward_tokenizer()
    for _ in range(50):
        question = task.draw_question(rng)
        response = "\n".join(task.corrupt(task.derived(question, 2), rng))
        text = f"Q:{question.content}\nA:{response}"
        assert policy.decode(policy(text)["input_ids"]) == text
        text = reward_text(question.content, response)
        ids = reward(text)["input_ids"]
        assert ids[0] == 1
        assert reward.decode(ids, skip_special_tokens=True) == text
        assert reward.unk_token_id not in ids


def test_an_entry_is_two_tokens_and_ends_are_single():
    policy, reward = policy_tokenizer(True), reward_tokenizer()
    assert policy.convert_ids_to_tokens(policy("b=c,a=2,b?")["input_ids"]) == ["b=", "c", ",", "a=", "2", ",", "b", "?"]
    assert policy.convert_ids_to_tokens(policy("so 3<|endoftext|>")["input_ids"]) == ["so ", "3", "<|endoftext|>"]
    assert reward.convert_ids_to_tokens(reward("Human: b?\nAssistant: so 3</s>")["input_ids"]) == [
        "<s>", "Human:", " ", "b", "?", "\n", "Assistant:", " ", "so ", "3", "</s>",
    ]  # fmt: skip
    assert (policy.pad_token_id, policy.eos_token_id, policy.bos_token_id) == (0, 0, None)
    assert (reward.pad_token_id, reward.bos_token_id, reward.eos_token_id) == (0, 1, 2)


def test_the_two_vocabularies_share_words_but_no_ids():
    policy, reward = policy_tokenizer(True).get_vocab(), reward_tokenizer().get_vocab()
    shared = (set(policy) & set(reward)) - {"<unk>"}
    assert len(shared) == 30
    assert not [word for word in shared if policy[word] == reward[word]]


def test_the_template_renders_prompts_and_conversations():
    tokenizer = policy_tokenizer(True)
    messages = [{"role": "user", "content": CONTENT}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == f"Q:{CONTENT}\nA:"
    messages.append({"role": "assistant", "content": "so 3"})
    assert tokenizer.apply_chat_template(messages, tokenize=False) == f"Q:{CONTENT}\nA:so 3<|endoftext|>"


def test_saved_folders_load_alike_and_only_the_instruct_has_a_template(tmp_path):
    model = models.new_policy(SMALL)
    models.save_policy(model, tmp_path / "base", with_template=False)
    models.save_policy(model, tmp_path / "instruct", with_template=True)
    base, instruct = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("base", "instruct"))
    assert base.chat_template is None
    assert instruct.chat_template == CHAT_TEMPLATE
    assert base(CONTENT)["input_ids"] == policy_tokenizer(False)(CONTENT)["input_ids"]
    configs = [(tmp_path / name / "config.json").read_bytes() for name in ("base", "instruct")]
    assert configs[0] == configs[1]
    with safe_open(tmp_path / "base" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" in file.keys()  # noqa: SIM118
        assert file.get_tensor("lm_head.weight").dtype == torch.bfloat16


def test_the_reward_folder_is_laid_out_as_ultrarm(tmp_path):
    models.save_reward(models.new_reward(SMALL, models.new_policy(SMALL)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaRewardModel"]
    assert config["model_type"] == "llama"
    assert "auto_map" not in config
    assert [config[f"{name}_token_id"] for name in ("pad", "bos", "eos")] == [0, 1, 2]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
        assert list(file.get_tensor("regression_head.weight").shape) == [1, 16]
    body = {f"model.{name}" for name in LlamaModel(models.load_reward(tmp_path).model.config).state_dict()}
    assert keys == body | {"regression_head.weight"}


def test_a_score_is_the_last_attended_tokens_and_ignores_padding(tmp_path):
    torch.manual_seed(0)
    models.save_reward(models.new_reward(SMALL, None), tmp_path)
    model, tokenizer = models.load_reward(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    texts = [reward_text(CONTENT, "so 3") + "</s>", reward_text(CONTENT, "b=c\nc=3\nso 3\ncheck\nb=c")]
    together = model.score(texts, tokenizer)
    for text, score in zip(texts, together, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        hidden = model.model(input_ids=ids).last_hidden_state[0, -1]
        assert score == pytest.approx((hidden @ model.regression_head.weight[0]).item(), abs=1e-6)
    assert together[0] != pytest.approx(together[1], abs=1e-4)


def test_the_reward_models_rows_follow_the_words():
    torch.manual_seed(0)
    base = models.new_policy(SMALL)
    reward = models.new_reward(SMALL, base)
    old, new = policy_tokenizer(False).get_vocab(), reward_tokenizer().get_vocab()
    for word, twin in (("b=", "b="), ("7", "7"), ("Human:", "Q:"), ("</s>", "<|endoftext|>")):
        row = reward.model.embed_tokens.weight[new[word]]
        assert torch.equal(row, base.model.embed_tokens.weight[old[twin]])
