"""Can these models be merged? Answered before any actor starts, from `config.json` and the safetensors headers.

Invariant: nothing is written, and no weight is read.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from c2f_ray.errors import RecipeError

MODEL_FILES = ("*.json", "model*.safetensors", "*.jinja", "*.model", "*.txt")
FLOAT_DTYPES = ("F32", "BF16", "F16")  # safetensors' names
MAX_LISTED = 8  # tensors named in one error
# Fields that say how a model is trained, served or described, not what its weights mean. All others are compared.
IGNORED_FIELDS = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "sep_token_id",
    "max_position_embeddings",
    "initializer_range",
    "attention_dropout",
    "hidden_dropout",
    "embd_pdrop",
    "resid_pdrop",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "output_router_logits",
    "pretraining_tp",
    "problem_type",
    "id2label",
    "label2id",
    "chunk_size_feed_forward",
}


@dataclass(frozen=True)
class TensorSpec:
    """Where a tensor lies and what it looks like, as its file's header says."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name, such as BF16


def model_folder(name: str | Path) -> Path:
    """The folder of a model: ``name`` itself, or a download when it is a name on the hub."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(MODEL_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(f"merge: {str(name)!r} is no folder here, and the hub did not give it ({reason})") from error


def check_models(models: Mapping[str, Path], allow: Sequence[str] = ()) -> dict[str, dict[str, TensorSpec]]:
    """Refuse models whose merge would be meaningless; return each role's tensors by name.

    ``models`` maps roles (base, coarse, instruct) to folders. Before training there is no coarse model yet: its
    configuration will be the base model's, so base and instruct are enough. ``allow`` lists configuration fields
    that may differ. Raises RecipeError with one line for each problem.
    """
    missing = [line for role, folder in models.items() for line in _missing_files(role, folder)]
    if missing:
        raise RecipeError(*missing)
    configs = {role: read_config(folder) for role, folder in models.items()}
    tensors = {role: read_tensors(folder) for role, folder in models.items()}
    problems = [*_config_problems(configs, allow), *_tensor_problems(tensors)]
    if problems:
        raise RecipeError(*problems)
    return tensors


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration as flat dotted fields, absent ones at their defaults.

    Rope settings lose their prefix (``rope_theta``), wherever a version of transformers keeps them.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"merge: {folder / 'config.json'} cannot be read: {error}") from error
    return dict(_flatten(config, ""))


def read_tensors(folder: Path) -> dict[str, TensorSpec]:
    """Every tensor of a model folder, from the headers of its safetensors files."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    tensors: dict[str, TensorSpec] = {}
    for file in [folder / name for name in names]:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (a handle is no mapping)
                    part = handle.get_slice(name)
                    tensors[name] = TensorSpec(file, tuple(part.get_shape()), part.get_dtype())
        except (OSError, SafetensorError) as error:
            raise RecipeError(f"merge: {file} is no complete safetensors file ({error}): copy it again") from error
    return tensors


def _flatten(config: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for key, value in config.items():
        if key in IGNORED_FIELDS:
            continue
        if isinstance(value, Mapping):
            yield from _flatten(value, prefix if key in ("rope_parameters", "rope_scaling") else f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _missing_files(role: str, folder: Path) -> list[str]:
    if not (folder / "config.json").is_file():
        return [f"merge.{role}: {folder} has no config.json: give a Hugging Face model folder"]
    if (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file():
        return []
    remedy = "give a Hugging Face model folder"
    if any(folder.glob("*.bin")):
        remedy = (
            "only pickled .bin weights, which are never loaded here. Convert them once: AutoModelForCausalLM"
            f".from_pretrained({str(folder)!r}).save_pretrained(NEW_FOLDER) writes safetensors"
        )
    elif (folder / "adapter_model.safetensors").is_file():
        remedy = "it holds an adapter: merge that into its model first (peft's merge_and_unload)"
    return [f"merge.{role}: {folder} has no model.safetensors: {remedy}"]


def _config_problems(configs: Mapping[str, Mapping[str, Any]], allow: Sequence[str]) -> list[str]:
    known = {field for config in configs.values() for field in config}
    problems = [
        f"merge.allow: {field!r} is no compared configuration field of these models"
        for field in allow
        if field not in known
    ]
    for field in sorted(known - set(allow)):
        values = {role: config.get(field) for role, config in configs.items()}
        if any(value != values["instruct"] for value in values.values()):
            said = ", ".join(f"{value!r} in {role}" for role, value in values.items())
            problems.append(
                f"merge: {field} is {said}: weights trained under different values do not add up. Take an instruct "
                f"model made from this base, or list {field} in merge.allow"
            )
    return problems


def _tensor_problems(tensors: Mapping[str, Mapping[str, TensorSpec]]) -> list[str]:
    known = sorted({name for specs in tensors.values() for name in specs})
    problems: list[str] = []
    for name in known:
        specs = {role: by_name.get(name) for role, by_name in tensors.items()}
        lacking = [role for role, spec in specs.items() if spec is None]
        present = {role: spec for role, spec in specs.items() if spec is not None}
        if lacking:
            problems.append(f"merge: tensor {name} is in {', '.join(present)} but not in {', '.join(lacking)}")
        if len({spec.shape for spec in present.values()}) > 1:
            shapes = ", ".join(f"{list(spec.shape)} in {role}" for role, spec in present.items())
            problems.append(f"merge: tensor {name} has shape {shapes}")
        for role, spec in present.items():
            if spec.dtype not in FLOAT_DTYPES:
                problems.append(f"merge.{role}: tensor {name} is {spec.dtype}: give unquantised weights")
    if len(problems) > MAX_LISTED:
        return [*problems[:MAX_LISTED], f"merge: and {len(problems) - MAX_LISTED} more problems with tensors"]
    return problems
