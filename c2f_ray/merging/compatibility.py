"""Can these models be merged? Answered before any actor starts: files, configurations, tokenizers, then tensors.

Invariant: nothing is written, no weight is read, and none is downloaded for models whose configurations differ.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from c2f_ray.data.model_folder import (
    TensorSpec,
    check_weights,
    fetch,
    find_model,
    has_tokenizer,
    read_config,
    read_tensors,
    read_tokenizer,
)
from c2f_ray.errors import RecipeError

FLOAT_DTYPES = ("F32", "BF16", "F16")  # safetensors' names
MAX_LISTED = 8  # tensors named in one error
TOKENIZER = "tokenizer"  # allows different vocabularies; no configuration has a field of this name
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
class Input:
    """A model that can be merged."""

    folder: Path  # absolute
    tensors: dict[str, TensorSpec]  # by name
    from_hub: bool  # then its folder is in this node's cache, which other nodes do not see


def check_inputs(given: Mapping[str, tuple[str, str]], allow: Sequence[str] = ()) -> dict[str, Input]:
    """Refuse models whose merge would be meaningless.

    ``given`` holds (dotted key, folder or name on the hub) by role: base, coarse, instruct. ``allow`` lists
    configuration fields that may differ, and ``tokenizer``. Only the instruct model, whose tokenizer the fine actors
    get, must have one. Raises RecipeError with one line for each problem.
    """
    files = {}
    configs: dict[str, dict[str, Any]] = {}
    vocabularies: dict[str, dict[str, int]] = {}
    problems: list[str] = []
    for role, (key, model) in given.items():
        try:
            files[role] = find_model(key, model)
            configs[role] = dict(_flatten(read_config(files[role]).to_dict(), ""))
            check_weights(files[role])
            if role == "instruct" or has_tokenizer(files[role]):
                vocabularies[role] = read_tokenizer(files[role]).get_vocab()
        except RecipeError as error:
            problems.extend(error.problems)
    _refuse(problems)
    _refuse([*_config_problems(configs, allow), *_vocabulary_problems(vocabularies, allow)])
    inputs = {}
    for role, (_, model) in given.items():
        fetched = fetch(model, files[role])
        inputs[role] = Input(fetched.folder, read_tensors(fetched), from_hub=not Path(model).is_dir())
    _refuse(_tensor_problems({role: model.tensors for role, model in inputs.items()}))
    return inputs


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise RecipeError(*problems)


def _flatten(config: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    """Dotted fields. Rope settings lose their prefix (``rope_theta``): they are nested in newer configurations only."""
    for key, value in config.items():
        if key in IGNORED_FIELDS:
            continue
        if isinstance(value, Mapping):
            yield from _flatten(value, prefix if key in ("rope_parameters", "rope_scaling") else f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _config_problems(configs: Mapping[str, Mapping[str, Any]], allow: Sequence[str]) -> list[str]:
    known = {field for config in configs.values() for field in config}
    problems = [
        f"merge.allow: {field!r} is no compared configuration field of these models"
        for field in allow
        if field not in known and field != TOKENIZER
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


def _vocabulary_problems(vocabularies: Mapping[str, Mapping[str, int]], allow: Sequence[str]) -> list[str]:
    """A row of the embeddings must stand for the same token in all models."""
    entries = [set(vocabulary.items()) for vocabulary in vocabularies.values()]
    different = {token for token, _ in set.union(*entries) - set.intersection(*entries)}
    if TOKENIZER in allow or not different:
        return []
    token = min(different)
    said = ", ".join(f"{vocabulary.get(token, 'none')} in {role}" for role, vocabulary in vocabularies.items())
    more = f" (and {len(different) - 1} more tokens differ)" if len(different) > 1 else ""
    return [
        f"merge: the token {token!r} has id {said}{more}. Take an instruct model made from this base, or list "
        f"{TOKENIZER} in merge.allow"
    ]


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
                problems.append(f"merge: tensor {name} is {spec.dtype} in {role}: give unquantised weights")
    if len(problems) > MAX_LISTED:
        return [*problems[:MAX_LISTED], f"merge: and {len(problems) - MAX_LISTED} more problems with tensors"]
    return problems
