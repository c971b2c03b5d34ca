"""Model folders: which files a Hugging Face model has, and what is wrong with one, told before any actor starts.

A model is a folder, or a name on the hub (`org/name`). Of its weights only the safetensors headers are read, and no
code that comes with it is ever run.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import model_info, snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from c2f_ray.data.shards import INDEX, WEIGHTS
from c2f_ray.errors import RecipeError

T = TypeVar("T")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # a tokenizer has one of them
# What a model that is made from another takes from it, byte for byte. The last two may be folders.
COMPANIONS = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json")
COMPANIONS += ("vocab*", "merges.txt", "chat_template*", "additional_chat_templates*")
SMALL_FILES = ["config.json", "README.md", INDEX, *COMPANIONS]
HUB_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model."""

    where: str  # how an error about it begins: its dotted key, and the model as it was given
    folder: Path  # absolute
    names: frozenset[str]  # without those in subfolders
    on_hub: bool  # then `folder` need not hold the weights


@dataclass(frozen=True)
class TensorSpec:
    """Where a tensor lies and what it looks like, as its file's header says."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name, such as BF16


def check_model(key: str, model: str) -> PreTrainedConfig:
    """The configuration of a model that has weights in safetensors and a tokenizer.

    Raises RecipeError naming `key`, the dotted key in the recipe. Fetches from the hub, but no weights.
    """
    files = find_model(key, model)
    config = read_config(files)
    check_weights(files)
    read_tokenizer(files)
    return config


def absolute_folder(model: str) -> str:
    """A folder's absolute path; a name on the hub stays as it is."""
    return str(Path(model).absolute()) if Path(model).is_dir() else model


def stamp(path: Path) -> list[str | int]:
    """What changes when a file does: its name, size and time of change."""
    return [path.name, path.stat().st_size, path.stat().st_mtime_ns]


def model_stamp(model: str) -> list[list[str | int]] | str:
    """What changes when a model does: its files, or the commit of it on the hub."""
    files = find_model("model", model)
    if files.on_hub:
        return files.folder.name
    return [stamp(files.folder / name) for name in sorted(files.names)]


def copy_tokenizer(model: str, folder: Path) -> None:
    """Copies a model's tokenizer, chat templates and generation settings into `folder`."""
    source = Path(model)
    if not source.is_dir():
        source = Path(snapshot_download(model, allow_patterns=list(COMPANIONS)))
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, folder / path.name)


def find_model(key: str, model: str) -> ModelFiles:
    """What there is of a model, in its folder or on the hub; nothing in it is checked."""
    where, folder = f"{key}: {model}", Path(model)
    if folder.is_dir():
        return _in_folder(where, folder)
    if model.count("/") != 1 or folder.parent.is_dir() or model.startswith((".", "/")):
        raise RecipeError(f"{where}: no such folder")
    try:
        listed = model_info(model, timeout=HUB_TIMEOUT_S).siblings or []
        folder = Path(snapshot_download(model, allow_patterns=SMALL_FILES))
        names = frozenset(file.rfilename for file in listed if "/" not in file.rfilename)
        return ModelFiles(where, folder.absolute(), names, on_hub=True)
    except Exception as error:  # the library raises a different type for every way of failing
        reason = _first_line(error)
    try:  # what an earlier download has left here
        return _in_folder(where, Path(snapshot_download(model, allow_patterns=SMALL_FILES, local_files_only=True)))
    except Exception:
        raise RecipeError(f"{where}: neither a model folder nor a model on the hub: {reason}") from None


def fetch(model: str, files: ModelFiles) -> ModelFiles:
    """The model with its weights in its folder, downloaded when it is on the hub."""
    if not files.on_hub:
        return files
    wanted = [*SMALL_FILES, *weight_files(files)]
    try:
        return _in_folder(files.where, Path(snapshot_download(model, allow_patterns=wanted)))
    except Exception as error:  # the library raises a different type for every way of failing
        raise RecipeError(f"{files.where}: the hub did not give its weights: {_first_line(error)}") from None


def read_config(files: ModelFiles) -> PreTrainedConfig:
    if "config.json" not in files.names:
        raise RecipeError(f"{files.where}: no config.json; give a Hugging Face model folder")
    return _read(files, "config.json", AutoConfig.from_pretrained)


def has_tokenizer(files: ModelFiles) -> bool:
    return not files.names.isdisjoint(TOKENIZER_FILES)


def read_tokenizer(files: ModelFiles) -> PreTrainedTokenizerBase:
    if not has_tokenizer(files):
        raise RecipeError(f"{files.where}: no tokenizer ({' or '.join(TOKENIZER_FILES)}); save it beside the model")
    tokenizer = _read(files, "its tokenizer", AutoTokenizer.from_pretrained)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def check_weights(files: ModelFiles) -> None:
    """Refuses weights that are missing or not whole; on the hub, where they are whole, only missing ones."""
    if files.on_hub:
        weight_files(files)
    else:
        read_tensors(files)


def weight_files(files: ModelFiles) -> list[str]:
    """The names of the safetensors files that transformers would load: the single one, or all that the index names."""
    if WEIGHTS in files.names:
        return [WEIGHTS]
    if INDEX not in files.names:
        raise RecipeError(f"{files.where}: holds {_no_weights(files.names)}")
    try:
        parts = sorted(set(json.loads((files.folder / INDEX).read_bytes())["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise RecipeError(f"{files.where}: {INDEX} is not the index of a model's weights; copy it again") from None
    if missing := [name for name in parts if name not in files.names]:
        raise RecipeError(
            f"{files.where}: lacks {', '.join(missing)}, which {INDEX} names; copy the whole folder again"
        )
    return parts


def read_tensors(files: ModelFiles) -> dict[str, TensorSpec]:
    """Every tensor of a model whose weights are in its folder, by name, from the headers of the safetensors files."""
    tensors: dict[str, TensorSpec] = {}
    for name in weight_files(files):
        file = files.folder / name
        try:
            with safe_open(file, framework="numpy") as handle:
                for tensor in handle.keys():  # noqa: SIM118 (a handle is no mapping)
                    part = handle.get_slice(tensor)
                    tensors[tensor] = TensorSpec(file, tuple(part.get_shape()), part.get_dtype())
        except (OSError, SafetensorError) as error:
            reason = _first_line(error)
            raise RecipeError(
                f"{files.where}: {name} is no complete safetensors file ({reason}); copy it again"
            ) from None
    return tensors


def _in_folder(where: str, folder: Path) -> ModelFiles:
    names = frozenset(path.name for path in folder.iterdir() if path.is_file())
    return ModelFiles(where, folder.absolute(), names, on_hub=False)


def _no_weights(names: frozenset[str]) -> str:
    suffixes = {Path(name).suffix for name in names}
    if not names.isdisjoint(("adapter_model.safetensors", "adapter_model.bin")):
        return "only an adapter; merge it into its model first (peft's merge_and_unload)"
    if ".safetensors" in suffixes:
        return f"neither {WEIGHTS} nor {INDEX}; save the model again with save_pretrained"
    found = "only .bin files, which are pickles" if ".bin" in suffixes else "no weights"
    return f"{found}; convert or save the weights as safetensors"


def _read(files: ModelFiles, what: str, load: Callable[..., T]) -> T:
    try:
        return load(files.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the libraries raise a different type for every way in which a file can be broken
        raise RecipeError(
            f"{files.where}: {what} cannot be read ({_first_line(error)}); copy it again, or give a model that "
            "transformers reads without remote code"
        ) from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def check_context(
    config: PreTrainedConfig,
    prompt_key: str,
    prompt: int,
    response_key: str,
    response: int,
    owner: str = "model",
    turns: int = 1,
) -> None:
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and turns * (prompt + response) > context:
        times = "" if turns == 1 else f", {turns} times,"
        raise RecipeError(
            f"{prompt_key} {prompt} and {response_key} {response} together{times} are {turns * (prompt + response)} "
            f"tokens, beyond the {owner}'s context of {context}; lower one of them"
        )
