"""UltraRM's published layout: pickled shards in, safetensors out, and what is no UltraRM named."""

import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from c2f_ray.cli import app
from c2f_ray.errors import RecipeError
from c2f_ray.reward.card import CardExample, card_examples
from c2f_ray.reward.convert import convert_reward
from c2f_ray.reward.ultrarm import load_ultrarm
from c2f_ray.tiny.tokenizer import reward_tokenizer

# As published with openbmb/UltraRM-13b, but for the sizes.
CONFIG = {
    "architectures": ["LlamaRewardModel"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 16, "initializer_range": 0.02, "intermediate_size": 24, "max_position_embeddings": 4096,
    "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 4,
    "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0", "use_cache": True,
    "vocab_size": 40,
}  # fmt: skip


def layer(number: int) -> dict[str, torch.Tensor]:
    sizes = {
        **{f"self_attn.{name}_proj.weight": (16, 16) for name in "qkvo"},
        "self_attn.rotary_emb.inv_freq": (2,),
        "mlp.gate_proj.weight": (24, 16), "mlp.up_proj.weight": (24, 16), "mlp.down_proj.weight": (16, 24),
        "input_layernorm.weight": (16,), "post_attention_layernorm.weight": (16,),
    }  # fmt: skip
    return {f"model.layers.{number}.{name}": torch.randn(size).half() for name, size in sizes.items()}


@pytest.fixture
def shards() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    first = {"model.embed_tokens.weight": torch.randn(40, 16).half(), **layer(0)}
    last = {"model.norm.weight": torch.randn(16).half(), "regression_head.weight": torch.randn(1, 16).half()}
    return [first, {**layer(1), **last}]


def write(folder: Path, shards: list[dict[str, torch.Tensor]]) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for number, tensors in enumerate(shards, start=1):
        torch.save(tensors, folder / f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin")


def test_every_tensor_arrives_and_the_model_loads(tmp_path: Path, shards: list[dict[str, torch.Tensor]]):
    write(tmp_path, shards)
    files = convert_reward(tmp_path)
    assert [path.name for path in files] == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
    ]  # fmt: skip
    written = load_file(files[0]) | load_file(files[1])
    given = {key: value for part in shards for key, value in part.items() if "inv_freq" not in key}
    assert written.keys() == given.keys()
    assert all(torch.equal(written[key], given[key]) for key in given)
    digests = json.loads((tmp_path / "conversion.json").read_text())["sha256"]
    assert len(digests) == 4
    for name, digest in digests.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    model = load_ultrarm(str(tmp_path), torch.float32)
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state[0, -1]
        expected = given["regression_head.weight"][0].float() @ hidden
        assert model(ids, torch.ones_like(ids)).item() == pytest.approx(expected.item(), abs=1e-6)
    with pytest.raises(RecipeError, match="has safetensors already"):
        convert_reward(tmp_path)


def missing(shards):
    del shards[1]["regression_head.weight"]


def extra(shards):
    shards[0]["lm_head.weight"] = torch.zeros(40, 16)


def wrong_shape(shards):
    shards[1]["regression_head.weight"] = torch.zeros(2, 16)


def twice(shards):
    shards[1]["model.embed_tokens.weight"] = shards[0]["model.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (missing, "not an UltraRM checkpoint: regression_head.weight missing"),
        (extra, "unexpected lm_head.weight"),
        (wrong_shape, r"regression_head.weight has the shape \[2, 16\], and config.json \[1, 16\]"),
        (twice, "model.embed_tokens.weight is in model-00001-of-00002.safetensors too"),
    ],
)
def test_another_layout_is_refused_and_nothing_written(tmp_path: Path, shards, change, problem: str):
    change(shards)
    write(tmp_path, shards)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(RecipeError, match=problem):
        convert_reward(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("evil"),)


def test_a_pickle_that_holds_more_than_tensors_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(RecipeError, match=r"pytorch_model.bin: not loaded"):
        convert_reward(tmp_path)
    assert not (tmp_path / "evil").exists()


def test_the_cards_examples_are_read_from_the_card(tmp_path: Path):
    card = tmp_path / "README.md"
    pairs = [{"chosen": f'Human: "{n}"\nAssistant: yes', "rejected": f"Human: {n}\nAssistant: no"} for n in (1, 2)]
    lines = "".join(f"  {json.dumps(pair, separators=(',', ':'))},\n" for pair in pairs)
    card.write_text(f"# Card\ndataset = [\n{lines}]\n# Output 1: 2.4158712085336447\n# Output 2: 0.1896953582763672\n")
    assert card_examples(card) == [
        CardExample(pairs[0]["chosen"], pairs[0]["rejected"], 2.4158712085336447),
        CardExample(pairs[1]["chosen"], pairs[1]["rejected"], 0.1896953582763672),
    ]
    card.write_text("# Card\n# Output 1: 2.5\n")
    with pytest.raises(RecipeError, match="0 examples and 1 outputs"):
        card_examples(card)


def test_doctor_compares_with_the_card(tmp_path: Path, shards, capsys: pytest.CaptureFixture[str]):
    """The card's numbers are made with the model itself: right ones pass, wrong ones fail."""
    write(tmp_path, shards)
    app(["convert-reward", str(tmp_path)], standalone_mode=False)
    assert [Path(line).name for line in capsys.readouterr().out.split()][-1] == "model.safetensors.index.json"
    reward_tokenizer().save_pretrained(tmp_path)
    pair = {"chosen": "Human: a?\nAssistant: so 1", "rejected": "Human: a?\nAssistant: so 2"}
    model, tokenizer = load_ultrarm(str(tmp_path), torch.float32), reward_tokenizer()
    with torch.no_grad():
        ids = {name: torch.tensor([tokenizer(text)["input_ids"]]) for name, text in pair.items()}
        scores = {name: model(row, torch.ones_like(row)).item() for name, row in ids.items()}
    difference = scores["chosen"] - scores["rejected"]
    assert abs(difference) > 0.05
    for said, level, code in ((difference, "ok", 0), (-difference, "failure", 1)):
        (tmp_path / "README.md").write_text(f"{json.dumps(pair, separators=(',', ':'))},\n# Output 1: {said}\n")
        with pytest.raises(SystemExit) as ended:
            app(["doctor", "--reward", "ultrarm", str(tmp_path)], standalone_mode=False)
        assert ended.value.code == code
        assert capsys.readouterr().out.startswith(
            f"{level}: example 1: chosen minus rejected {difference:.4f}, the card"
        )
