"""What lies beside the weights in a fine actor's folder: tokenizer, configuration, index, manifest, card."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from c2f_ray.data.model_folder import copy_tokenizer
from c2f_ray.data.shards import write_index
from c2f_ray.merging.methods import FORMULAS, ROLES
from c2f_ray.merging.plan import MergePlan
from c2f_ray.merging.shards import ShardDigests, Variant


def write_companions(plan: MergePlan, folders: Mapping[str, Path], digests: Sequence[ShardDigests]) -> None:
    """Completes the folder of each variant. ``digests`` are in the order of the plan's shards."""
    inputs = _input_summary(plan, digests)
    for variant in plan.variants:
        folder = folders[variant.name]
        files = {s.file_name: d.files[variant.name] for s, d in zip(plan.shards, digests, strict=True)}
        copy_tokenizer(str(plan.inputs["instruct"].folder), folder)
        _write_config(plan, folder)
        write_index(folder, plan.shards)
        _write_manifest(folder, variant, inputs, files, plan)
        _write_card(folder, variant, inputs)


def _input_summary(plan: MergePlan, digests: Sequence[ShardDigests]) -> dict[str, dict[str, object]]:
    """Folder and content digest of each input.

    ``tensors_sha256`` is the SHA-256 of the lines ``NAME SHA256(tensor bytes)\\n`` in order of name: it was computed
    while merging, and stays the same when a model is saved again in other shards.
    """
    summary: dict[str, dict[str, object]] = {}
    for role, model in plan.inputs.items():
        tensors = {name: sha for part in digests for name, sha in part.inputs[role].items()}
        lines = "".join(f"{name} {sha}\n" for name, sha in sorted(tensors.items()))
        summary[role] = {
            "folder": str(model.folder),
            "tensors": len(tensors),
            "tensors_sha256": hashlib.sha256(lines.encode()).hexdigest(),
            "config_sha256": hashlib.sha256((model.folder / "config.json").read_bytes()).hexdigest(),
        }
    return summary


def _write_config(plan: MergePlan, folder: Path) -> None:
    config = json.loads((plan.inputs["instruct"].folder / "config.json").read_text(encoding="utf-8"))
    if plan.dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = plan.dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_manifest(
    folder: Path,
    variant: Variant,
    inputs: Mapping[str, Mapping[str, object]],
    files: Mapping[str, str],
    plan: MergePlan,
) -> None:
    manifest = {
        "method": variant.method,
        "formula": FORMULAS[variant.method],
        "ratio": variant.ratio,
        "dtype": plan.dtype or "of the instruct model",
        "allow": list(plan.allow),
        "inputs": {role: inputs[role] for role in ROLES[variant.method]},
        "files_sha256": dict(files),
        "versions": {name: version(name) for name in ("c2f-ray", "torch", "safetensors", "transformers")},
    }
    (folder / "merge.json").write_text(json.dumps(manifest, indent=2) + "\n")


def _write_card(folder: Path, variant: Variant, inputs: Mapping[str, Mapping[str, object]]) -> None:
    rows = "".join(
        f"| {role} | `{inputs[role]['folder']}` | `{inputs[role]['tensors_sha256']}` |\n"
        for role in ROLES[variant.method]
    )
    (folder / "README.md").write_text(
        f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- merge
- c2f_ray
---
# Fine actor {variant.name}

A fine actor of the coarse-to-fine recipe: a coarse actor, trained by RL from the base model, merged with an
instruct model by `{variant.method}` at ratio {variant.ratio:g}:

    {FORMULAS[variant.method]}

computed in float32 for every tensor and rounded once. Tokenizer, chat template, generation settings and
configuration are the instruct model's. The licences of all the models below apply.

| role | model | SHA-256 of its tensors |
|---|---|---|
{rows}
`merge.json` holds the same facts, the SHA-256 of each weight file and the versions used.
"""
    )
