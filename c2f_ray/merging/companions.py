"""What lies beside the weights in a fine actor's folder: tokenizer, configuration, index, manifest, card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load
from xxhash import xxh3_128

from c2f_ray.data.model_folder import copy_tokenizer
from c2f_ray.data.shards import write_index
from c2f_ray.merging.methods import FORMULAS, ROLES
from c2f_ray.merging.plan import MANIFEST, MergePlan
from c2f_ray.merging.shards import Variant

LICENCE_FIELDS = ("license", "license_name", "license_link")  # of a model card's header


def write_companions(plan: MergePlan, records: Sequence[Mapping[str, Any]]) -> None:
    """Completes the folder of each variant. ``records`` are in the order of the plan's shards."""
    inputs = _input_summary(plan, records)
    for variant in plan.todo:
        folder = plan.aside / variant.name
        files = {s.file_name: record["files"][variant.name] for s, record in zip(plan.shards, records, strict=True)}
        copy_tokenizer(str(plan.models.folders["instruct"]), folder)
        _write_config(plan, folder)
        write_index(folder, plan.shards)
        manifest = _manifest(plan, variant, inputs, files)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        (folder / "README.md").write_text(_card(plan, variant, manifest))


def _input_summary(plan: MergePlan, records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, object]]:
    """Folder, configuration and checksum of each input.

    ``tensors_xxh3_128`` is the XXH3-128 of the lines ``NAME XXH3-128(tensor bytes)\\n`` in order of name: it was
    computed while merging, and stays the same when a model is saved again in other shards.
    """
    summary: dict[str, dict[str, object]] = {}
    for role, folder in plan.models.folders.items():
        tensors = {name: digest for record in records for name, digest in record["inputs"][role].items()}
        lines = "".join(f"{name} {digest}\n" for name, digest in sorted(tensors.items()))
        summary[role] = {
            "folder": str(folder),
            "tensors": len(tensors),
            "tensors_xxh3_128": xxh3_128(lines.encode()).hexdigest(),
            "config": json.loads((folder / "config.json").read_text(encoding="utf-8")),
        }
    return summary


def _write_config(plan: MergePlan, folder: Path) -> None:
    config = json.loads((plan.models.folders["instruct"] / "config.json").read_text(encoding="utf-8"))
    if plan.recipe.dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = plan.recipe.dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _manifest(
    plan: MergePlan, variant: Variant, inputs: Mapping[str, Mapping[str, object]], files: Mapping[str, str]
) -> dict[str, Any]:
    ratios: dict[str, Any] = {f"{ratio:g}": ratio for ratio in plan.recipe.ratios}
    ratios |= {schedule.name: schedule.model_dump() for schedule in plan.recipe.schedules}
    return {
        "method": variant.method,
        "formula": FORMULAS[variant.method],
        "ratio": ratios[variant.label],
        **plan.settings_of(variant),
        "dtype": plan.recipe.dtype or "of the instruct model",
        "allow": plan.recipe.allow,
        "tokens_kept_from_instruct": plan.models.absent_tokens,
        "inputs": {role: inputs[role] for role in ROLES[variant.method]},
        "files_xxh3_128": dict(files),
        "versions": plan.versions,
        "identity": plan.identity[variant.name],
    }


def _card(plan: MergePlan, variant: Variant, manifest: Mapping[str, Any]) -> str:
    inputs = manifest["inputs"]
    cards = {role: _card_header(plan.models.folders[role]) for role in inputs}
    own = {key: value for key, value in cards["instruct"].items() if key in LICENCE_FIELDS}
    header = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["merge", "c2f_ray"], **own}
    rows = "".join(
        f"| {role} | `{inputs[role]['folder']}` | {card.get('license', 'not stated')} "
        f"| `{inputs[role]['tensors_xxh3_128']}` |\n"
        for role, card in cards.items()
    )
    ratio = manifest["ratio"]
    said = f"ratio {ratio:g}" if isinstance(ratio, float) else f"the ratios of the schedule `{variant.label}`"
    return f"""---
{yaml.safe_dump(header, sort_keys=False)}---
# Fine actor {variant.name}

A fine actor of the coarse-to-fine recipe: a coarse actor, trained by RL from the base model, merged with an
instruct model by `{variant.method}` at {said}:

    {manifest["formula"]}

computed in float32 for every tensor and rounded once. Tokenizer, chat template, generation settings and
configuration are the instruct model's. The licences of all the models below apply.

| role | model | licence | XXH3-128 of its tensors |
|---|---|---|---|
{rows}
`merge.json` holds the same facts and all settings, the models' configurations, the XXH3-128 checksum of each weight
file (`xxh128sum` prints it) and the versions used.
"""


def _card_header(folder: Path) -> dict[str, Any]:
    """The YAML header of a model's card, empty when there is none that can be read."""
    try:
        return metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
