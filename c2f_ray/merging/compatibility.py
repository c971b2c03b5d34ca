"""Can these models be merged? Answered before any actor starts: files, configurations, tokenizers, then tensors.

Invariant: nothing is written, no weight is read, and none is downloaded for models whose configurations differ.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
TOKENIZER = "tokenizer"  # allows quite different vocabularies; no configuration has a field of this name
MIN_SHARED_TOKENS = 0.9  # of the larger vocabulary
# Their rows stand for tokens: embeddings and head of Llama, Mistral, Mixtral, Qwen and most others; GPT-2; GPT-NeoX.
VOCABULARY_TENSORS = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias", "wte.weight")
VOCABULARY_TENSORS += ("embed_in.weight", "embed_out.weight")
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
    "vocab_size",  # rows are matched by token
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
class Models:
    """Models that can be merged, by role: base, coarse, instruct."""

    folders: dict[str, Path]  # absolute
    tensors: dict[str, dict[str, TensorSpec]]  # by name
    rows: dict[str, dict[str, Tensor]]  # see `shards.Work`; empty when the vocabularies are the same
    absent_tokens: int  # rows of the instruct model that are kept, for other models have no such token
    on_hub: bool  # one at least: then its folder is in this node's cache, which other nodes do not see


def check_inputs(given: Mapping[str, tuple[str, str]], allow: Sequence[str] = ()) -> Models:
    """Refuse models whose merge would be meaningless.

    ``given`` holds (dotted key, folder or name on the hub) by role: base, coarse, instruct. ``allow`` lists
    configuration fields that may differ, and ``tokenizer``. Only the instruct model, whose tokenizer the fine actors
    get, must have one; the vocabulary of a model without one is taken to be the instruct model's.
    Raises RecipeError with one line for each problem.
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
    fetched = {role: fetch(model, files[role]) for role, (_, model) in given.items()}
    tensors = {role: read_tensors(model) for role, model in fetched.items()}
    names = [name for name in tensors["instruct"] if ".".join(name.split(".")[-2:]) in VOCABULARY_TENSORS]
    counts = {
        name: {role: by_name[name].shape[0] for role, by_name in tensors.items() if name in by_name} for name in names
    }
    rows: dict[str, dict[str, Tensor]] = {}
    if _differ(vocabularies) or (len(vocabularies) == len(given) and any(map(_differ, counts.values()))):
        _refuse(
            f"merge: the vocabularies differ, and {given[role][1]} has no tokenizer to match rows by: save it beside it"
            for role in given.keys() - vocabularies.keys()
        )
        rows = {name: _same_tokens(vocabularies, by_role) for name, by_role in counts.items()}
    _refuse(_tensor_problems(tensors, rows))
    absent = max((int((torch.stack(list(by_role.values())).amin(0) < 0).sum()) for by_role in rows.values()), default=0)
    folders = {role: model.folder for role, model in fetched.items()}
    return Models(folders, tensors, rows, absent, any(not Path(model).is_dir() for _, model in given.values()))


def _differ(values: Mapping[str, object]) -> bool:
    return any(value != values["instruct"] for value in values.values())


def _same_tokens(vocabularies: Mapping[str, Mapping[str, int]], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """For each row of the instruct model, the other models' rows of the same token; -1 where there is none.

    ``counts`` are the numbers of rows. Rows beyond a tokenizer's last token, which some models are padded with, have
    no token and are not merged.
    """
    rows = {}
    for role in counts:
        if role != "instruct":
            order = torch.full((counts["instruct"],), -1)
            for token, row in vocabularies["instruct"].items():
                other = vocabularies[role].get(token, -1)
                if row < counts["instruct"] and other < counts[role]:
                    order[row] = other
            rows[role] = order
    return rows


def _refuse(problems: Iterable[str]) -> None:
    problems = list(problems)
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
    """Rows of the embeddings are matched by token: that a few have been added is no problem, another language is."""
    tokens = set(vocabularies["instruct"])
    problems = []
    for role, vocabulary in vocabularies.items():
        shared = len(tokens & set(vocabulary)) / max(len(tokens), len(vocabulary))
        if shared < MIN_SHARED_TOKENS and TOKENIZER not in allow:
            problems.append(
                f"merge: {role} and instruct share {shared:.1%} of their tokens, less than {MIN_SHARED_TOKENS:.0%}: "
                "their embeddings do not add up. Take an instruct model made from this base, or list tokenizer in "
                "merge.allow to merge the rows of those that they share"
            )
    return problems


def _tensor_problems(
    tensors: Mapping[str, Mapping[str, TensorSpec]], rows: Mapping[str, Mapping[str, Tensor]]
) -> list[str]:
    known = sorted({name for specs in tensors.values() for name in specs})
    problems: list[str] = []
    for name in known:
        specs = {role: by_name.get(name) for role, by_name in tensors.items()}
        lacking = [role for role, spec in specs.items() if spec is None]
        present = {role: spec for role, spec in specs.items() if spec is not None}
        if lacking:
            problems.append(f"merge: tensor {name} is in {', '.join(present)} but not in {', '.join(lacking)}")
        if len({spec.shape[1:] if name in rows else spec.shape for spec in present.values()}) > 1:
            shapes = ", ".join(f"{list(spec.shape)} in {role}" for role, spec in present.items())
            problems.append(f"merge: tensor {name} has shape {shapes}")
        for role, spec in present.items():
            if spec.dtype not in FLOAT_DTYPES:
                problems.append(f"merge: tensor {name} is {spec.dtype} in {role}: give unquantised weights")
    if len(problems) > MAX_LISTED:
        return [*problems[:MAX_LISTED], f"merge: and {len(problems) - MAX_LISTED} more problems with tensors"]
    return problems
