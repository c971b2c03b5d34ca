"""What is refused of a model's folder, or of its repository on the hub, and in which words. No weights are read."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from c2f_ray.data import model_folder
from c2f_ray.data.model_folder import (
    COMPANIONS,
    INDEX,
    SMALL_FILES,
    WEIGHTS,
    TensorSpec,
    check_model,
    copy_tokenizer,
    fetch,
    find_model,
    read_tensors,
)
from c2f_ray.errors import RecipeError
from c2f_ray.tiny.tokenizer import policy_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_model(folder: Path) -> Path:
    """Two shards, an index, a tokenizer and a template."""
    policy_tokenizer(with_template=True).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral", "max_position_embeddings": 256}))
    save_file({"a": np.zeros((2, 3), np.float32)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": np.zeros(5, np.float16)}, folder / "model-00002-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def remove_weights(folder: Path) -> None:
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()


def only(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        remove_weights(folder)
        (folder / name).write_bytes(b"")
        (folder / "training_args.bin").write_bytes(b"")

    return damage


def cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


REMEDY = "copy it again, or give a model that transformers reads without remote code"
REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json; give a Hugging Face model folder"),
    "a config that is not JSON": (
        cut("config.json", 9),
        "config.json cannot be read (OSError: It looks like the config file at 'FOLDER/config.json' is not a valid "
        f"JSON file.); {REMEDY}",
    ),
    "no weights": (remove_weights, "holds no weights; convert or save the weights as safetensors"),
    "pickles": (
        only("pytorch_model.bin"),
        "holds only .bin files, which are pickles; convert or save the weights as safetensors",
    ),
    "an adapter": (
        only("adapter_model.safetensors"),
        "holds only an adapter; merge it into its model first (peft's merge_and_unload)",
    ),
    "another layout": (
        only("consolidated.safetensors"),
        "holds neither model.safetensors nor model.safetensors.index.json; save the model again with save_pretrained",
    ),
    "a missing shard": (
        lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
        "lacks model-00002-of-00002.safetensors, which model.safetensors.index.json names; copy the whole folder again",
    ),
    "an index that is none": (
        lambda f: (f / INDEX).write_text('{"weight_map": []}'),
        "model.safetensors.index.json is not the index of a model's weights; copy it again",
    ),
    "a cut shard": (
        cut("model-00002-of-00002.safetensors", -2),
        "model-00002-of-00002.safetensors is no complete safetensors file (SafetensorError: Error while deserializing "
        "header: incomplete metadata, file not fully covered); copy it again",
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        "no tokenizer (tokenizer.json or tokenizer.model); save it beside the model",
    ),
    "a cut tokenizer": (
        cut("tokenizer.json", 1),
        "its tokenizer cannot be read (JSONDecodeError: Expecting property name enclosed in double quotes: "
        f"line 1 column 2 (char 1)); {REMEDY}",
    ),
    "a tokenizer without a vocabulary": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        f"its tokenizer cannot be read (KeyError: 'added_tokens'); {REMEDY}",
    ),
}


def refusal(model: str) -> str:
    with pytest.raises(RecipeError) as error:
        check_model("policy.model", model)
    (problem,) = error.value.problems
    return problem


def test_a_good_folder_passes(tmp_path: Path):
    folder = write_model(tmp_path / "model")
    assert check_model("policy.model", str(folder)).max_position_embeddings == 256
    first, second = (folder / f"model-0000{part}-of-00002.safetensors" for part in (1, 2))
    assert read_tensors(find_model("policy.model", str(folder))) == {
        "a": TensorSpec(first, (2, 3), "F32"),
        "b": TensorSpec(second, (5,), "F16"),
    }


def test_a_single_file_comes_before_an_index_as_in_transformers(tmp_path: Path):
    folder = write_model(tmp_path / "model")
    save_file({"c": np.zeros(7, np.float32)}, folder / WEIGHTS)
    assert list(read_tensors(find_model("policy.model", str(folder)))) == ["c"]


@pytest.mark.parametrize("what", REFUSALS)
def test_a_broken_folder_is_refused_in_one_line(tmp_path: Path, what: str):
    folder = write_model(tmp_path / "model")
    damage, said = REFUSALS[what]
    damage(folder)
    assert refusal(str(folder)) == f"policy.model: {folder}: {said}".replace("FOLDER", str(folder))


@pytest.mark.parametrize("model", ["nowhere", "./a/b", "/nowhere/model", "a/b/c"])
def test_no_such_folder(model: str):
    assert refusal(model) == f"policy.model: {model}: no such folder"


def test_a_models_own_code_is_refused_and_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    folder = write_model(tmp_path / "model")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    said = refusal(str(folder))
    assert said.startswith(f"policy.model: {folder}: config.json cannot be read (ValueError: The repository {folder}")
    assert said.endswith(REMEDY)
    assert "\n" not in said


class FakeHub:
    """A hub with one repository, which lies in ``repository``; ``fetched`` gets a copy of what was asked for."""

    def __init__(self, repository: Path, fetched: Path) -> None:
        self.repository, self.fetched, self.asked = repository, fetched, []

    def model_info(self, model: str, timeout: float) -> SimpleNamespace:
        names = [str(path.relative_to(self.repository)) for path in self.repository.rglob("*") if path.is_file()]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def snapshot_download(self, model: str, allow_patterns: list[str]) -> str:
        self.asked.append(allow_patterns)
        self.fetched.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for path in self.repository.glob(pattern):
                (self.fetched / path.name).write_bytes(path.read_bytes())
        return str(self.fetched)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    hub = FakeHub(write_model(tmp_path / "repository"), tmp_path / "fetched")
    monkeypatch.setattr(model_folder, "model_info", hub.model_info)
    monkeypatch.setattr(model_folder, "snapshot_download", hub.snapshot_download)
    return hub


def test_the_check_of_a_model_on_the_hub_fetches_no_weights(hub: FakeHub):
    assert check_model("policy.model", "org/model").max_position_embeddings == 256
    assert hub.asked == [SMALL_FILES]
    assert not list(hub.fetched.glob("*.safetensors"))
    files = fetch("org/model", find_model("policy.model", "org/model"))
    assert set(read_tensors(files)) == {"a", "b"}
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert hub.asked[-1] == [*SMALL_FILES, *shards]


def test_a_repository_on_the_hub_meets_the_same_rules(hub: FakeHub):
    only("pytorch_model.bin")(hub.repository)
    (hub.repository / "original").mkdir()  # what lies in subfolders is not what transformers loads
    (hub.repository / "original" / WEIGHTS).write_bytes(b"")
    assert refusal("openbmb/UltraRM-13b") == (
        "policy.model: openbmb/UltraRM-13b: holds only .bin files, which are pickles; "
        "convert or save the weights as safetensors"
    )


def test_a_shard_that_the_hub_lacks(hub: FakeHub):
    (hub.repository / "model-00001-of-00002.safetensors").unlink()
    assert refusal("org/model") == (
        "policy.model: org/model: lacks model-00001-of-00002.safetensors, which model.safetensors.index.json names; "
        "copy the whole folder again"
    )


def test_offline_the_cache_is_checked_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    folder = write_model(repository / "snapshots" / COMMIT)
    assert check_model("policy.model", "org/model").max_position_embeddings == 256
    cut(WEIGHTS.replace(".", "-00001-of-00002."), 3)(folder)
    assert refusal("org/model").startswith(
        "policy.model: org/model: model-00001-of-00002.safetensors is no complete safetensors file ("
    )
    remove_weights(folder)  # only the tokenizer was ever fetched
    assert refusal("org/model") == (
        "policy.model: org/model: holds no weights; convert or save the weights as safetensors"
    )
    assert refusal("org/other").startswith(
        "policy.model: org/other: neither a model folder nor a model on the hub: OfflineModeIsEnabled: Cannot reach "
    )


def test_a_tokenizer_is_copied_whole(tmp_path: Path):
    source = write_model(tmp_path / "model")
    for name in ("generation_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"):
        (source / name).write_text(name)
    for name in ("chat_templates", "additional_chat_templates"):
        (source / name).mkdir()
        (source / name / "tool.jinja").write_text(name)
    (source / "notes.md").write_text("not the tokenizer's")
    (tmp_path / "copy").mkdir()
    copy_tokenizer(str(source), tmp_path / "copy")
    copied = {str(path.relative_to(tmp_path / "copy")) for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert copied == {
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "chat_templates/tool.jinja",
        "generation_config.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    }
    assert all((tmp_path / "copy" / name).read_bytes() == (source / name).read_bytes() for name in copied)


def test_a_tokenizer_is_copied_from_the_hub(hub: FakeHub, tmp_path: Path):
    (tmp_path / "copy").mkdir()
    copy_tokenizer("org/model", tmp_path / "copy")
    assert hub.asked == [list(COMPANIONS)]
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
