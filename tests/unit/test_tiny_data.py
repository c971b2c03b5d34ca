"""The tiny world that ships with the package: its files are those of the manifest, and recipes find them anywhere."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from c2f_ray.errors import RecipeError
from c2f_ray.recipe import dump_recipe, load_recipe
from c2f_ray.recipe.location import TINY_DATA, resolve, shorten
from c2f_ray.tiny.manifest import MANIFEST, differences
from c2f_ray.tiny.models import load_reward
from c2f_ray.tiny.prompts import write_prompts
from c2f_ray.tiny.settings import CHAT_TEMPLATE, Settings

MODELS = ("base", "instruct", "reward", "pair_policy", "pair_reference")
MIB = 2**20


def test_the_files_are_those_of_the_manifest_and_a_changed_one_is_named(tmp_path: Path):
    assert differences(TINY_DATA) == []
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / MANIFEST).write_text(json.dumps({"files": {"a.txt": "0" * 64, "gone.txt": "0" * 64}}))
    (tmp_path / "new.txt").write_text("y")
    assert differences(tmp_path) == ["a.txt: changed", "gone.txt: missing", "new.txt: not in the manifest"]


def test_the_manifest_says_how_the_models_were_made_and_that_all_gates_passed():
    manifest = json.loads((TINY_DATA / MANIFEST).read_text())
    assert manifest["settings"] == json.loads(json.dumps(Settings().__dict__))
    assert manifest["machine"]
    assert len(manifest["gates"]) == 11
    assert all(gate["measured"] >= gate["required"] for gate in manifest["gates"])


def test_the_data_takes_no_more_than_12_mib_and_weights_are_bfloat16():
    assert sum(path.stat().st_size for path in TINY_DATA.rglob("*") if path.is_file()) <= 12 * MIB
    for model in MODELS:
        with safe_open(TINY_DATA / model / "model.safetensors", "pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}, model  # noqa: SIM118
        assert json.loads((TINY_DATA / model / "config.json").read_text())["dtype"] == "bfloat16", model


@pytest.mark.parametrize("model", ["base", "instruct", "pair_policy", "pair_reference"])
def test_every_model_loads_in_plain_transformers_and_answers_as_its_kind(model: str):
    tokenizer = AutoTokenizer.from_pretrained(TINY_DATA / model)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        TINY_DATA / model, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert loaded.get_input_embeddings().weight.shape[0] == len(tokenizer)
    question = "b=c,a=2,f=e,e=a,c=3,d=f,b?"
    pair = model.startswith("pair")
    ids = tokenizer(f"Human: {question}\nAssistant: " if pair else f"Q:{question}\nA:", return_tensors="pt")
    ids.pop("token_type_ids", None)
    answer = tokenizer.decode(loaded.generate(**ids, max_new_tokens=7, do_sample=False)[0, ids["input_ids"].shape[1] :])
    if model == "pair_policy":
        assert answer.startswith("b=c\nc=3\n"), "it prefers derivations"
    elif model == "instruct":
        assert answer.startswith("so "), "it answers at once"


def test_the_reward_model_prefers_the_right_digit():
    tokenizer = AutoTokenizer.from_pretrained(TINY_DATA / "reward")
    question = "Human: b=c,a=2,f=e,e=a,c=3,d=f,b?\nAssistant: b=c\nc=3\nso "
    right, wrong = load_reward(TINY_DATA / "reward").score([f"{question}3</s>", f"{question}2</s>"], tokenizer)
    assert right > wrong + 0.5


def test_prompts_and_template_are_what_the_code_makes(tmp_path: Path):
    write_prompts(tmp_path / "prompts", Settings())
    for name in ("train.jsonl", "heldout.jsonl", "texts.jsonl"):
        assert (tmp_path / "prompts" / name).read_bytes() == (TINY_DATA / "prompts" / name).read_bytes()
    assert (TINY_DATA / "instruct" / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_a_recipe_names_the_data_in_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("tiny")
    assert Path(recipe.policy.model) == TINY_DATA / "base"
    assert Path(recipe.prompts.source).is_file()
    stored = dump_recipe(recipe)
    assert "model: tiny:base" in stored and str(TINY_DATA) not in stored, "the same on every machine"
    (tmp_path / "stored.yaml").write_text(stored)
    assert load_recipe("stored.yaml") == recipe


def test_a_part_that_the_world_does_not_have_is_refused_with_the_nearest():
    with pytest.raises(RecipeError) as error:
        load_recipe("tiny", "policy.model=tiny:bse", "merge.instruct=tiny:../../cli.py", "reward.model='tiny:'")
    policy, reward, merge = error.value.problems
    assert policy == "policy.model: 'tiny:bse': the tiny world has no 'bse'; did you mean tiny:base?"
    assert merge.startswith("merge.instruct: 'tiny:../../cli.py': the tiny world has no '../../cli.py'; it has base, ")
    assert reward.startswith("reward.model: 'tiny:': the tiny world has no ''")


def test_other_names_are_kept():
    assert resolve("mistralai/Mistral-7B-v0.1") == shorten("mistralai/Mistral-7B-v0.1") == "mistralai/Mistral-7B-v0.1"
    assert shorten(resolve("tiny:prompts/train.jsonl")) == "tiny:prompts/train.jsonl"
