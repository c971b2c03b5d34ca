"""The merge job: coarse actor and instruct model in, one ordinary Hugging Face folder per fine actor out.

Invariant: a fine folder is complete or it is not there: all are written in `OUT.partial/` and renamed at the end.
Inputs and output must lie on a file system that every node of the cluster sees.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import ray

from c2f_ray.errors import DeadlineError, RecipeError
from c2f_ray.merging.compatibility import TensorSpec, check_models, model_folder
from c2f_ray.merging.methods import FORMULAS, ROLES
from c2f_ray.merging.shards import Shard, ShardDigests, Variant, merge_shard, plan_shards
from c2f_ray.preflight import Needs, run_folder
from c2f_ray.recipe import Recipe
from c2f_ray.session import ray_session

SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# What a fine actor takes from the instruct model besides its weights.
COMPANION_FILES = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json")
COMPANION_FILES += ("vocab.*", "merges.txt", "chat_template*")
MAX_SHARD_BYTES = 5 * 10**9


def merge(recipe: Recipe) -> list[Path]:
    """The recipe's fine actors, in the run's `fine/`. Raises what `merge_models` raises."""
    settings = recipe.merge
    if settings is None:
        raise RecipeError("merge: missing; it names the instruct model and the ratios")
    folder = run_folder(recipe)
    coarse = settings.coarse or str(folder / "coarse")
    if settings.coarse is None and not Path(coarse).is_dir():
        raise RecipeError(f"merge.coarse: {coarse}: no coarse actor there; run `c2f-ray train` with this recipe first")
    with ray_session(recipe, Needs(gpus=0, cpus=1, gpus_of_one_actor=0)):
        return merge_models(
            settings.base or recipe.policy.model,
            coarse,
            settings.instruct,
            settings.methods,
            settings.ratios,
            settings.allow,
            settings.dtype,
            folder / "fine",
        )


def merge_models(
    base: str | Path,
    coarse: str | Path,
    instruct: str | Path,
    methods: Sequence[str],
    ratios: Sequence[float],
    allow: Sequence[str],
    dtype: str | None,
    out: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    timeout_s: float = 3600,
) -> list[Path]:
    """Write a fine actor for each method and ratio, as ``out/METHOD-RATIO``, and return their folders.

    The models are folders or names on the hub. ``dtype`` is that of the files written (a recipe's name); each
    tensor's in the instruct model when None. Needs an initialised Ray; one task writes one shard of every output.
    Raises RecipeError, with nothing written, when the models cannot be merged or an output folder exists, and
    DeadlineError when no shard is finished for ``timeout_s`` seconds.
    """
    roles = {role for method in methods for role in ROLES[method]}
    given = {"base": base, "coarse": coarse, "instruct": instruct}
    models = {role: model_folder(name).resolve() for role, name in given.items() if role in roles}
    tensors = check_models(models, allow)
    variants = [Variant(method, ratio) for method in methods for ratio in ratios]
    out = out.resolve()
    shards = plan_shards(tensors["instruct"], dtype and SAFETENSORS_NAMES[dtype], max_shard_bytes)
    _check_outputs(variants, shards, out)

    aside = out.with_name(out.name + ".partial")
    partial = {variant.name: aside / variant.name for variant in variants}
    try:
        shutil.rmtree(aside, ignore_errors=True)  # of a merge that was killed
        for folder in partial.values():
            folder.mkdir(parents=True)
        digests = _run_tasks(shards, tensors, variants, partial, timeout_s)
        inputs = _input_summary(models, digests)
        for variant in variants:
            folder = partial[variant.name]
            files = {s.file_name: d.files[variant.name] for s, d in zip(shards, digests, strict=True)}
            _write_companions(folder, models["instruct"], dtype)
            _write_index(folder, shards)
            _write_manifest(folder, variant, inputs, files, allow, dtype)
            _write_card(folder, variant, inputs)
        out.mkdir(parents=True, exist_ok=True)
        return [partial[variant.name].rename(out / variant.name) for variant in variants]
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check_outputs(variants: Sequence[Variant], shards: Sequence[Shard], out: Path) -> None:
    names = [variant.name for variant in variants]
    problems = [f"merge: {name} is asked for twice" for name in sorted({n for n in names if names.count(n) > 1})]
    problems += [
        f"merge: {out / name} exists and is not overwritten: remove it, or merge into another folder"
        for name in names
        if (out / name).exists()
    ]
    existing = next(folder for folder in (out, *out.parents) if folder.is_dir())
    needed_gib = len(variants) * sum(shard.num_bytes for shard in shards) / 2**30
    free_gib = shutil.disk_usage(existing).free / 2**30
    if needed_gib > free_gib:
        problems.append(
            f"merge: {len(variants)} models need {needed_gib:.1f} GiB and {existing} has {free_gib:.1f} free: "
            "take fewer merge.ratios, or another folder"
        )
    if problems:
        raise RecipeError(*problems)


def _run_tasks(
    shards: Sequence[Shard],
    tensors: Mapping[str, Mapping[str, TensorSpec]],
    variants: Sequence[Variant],
    folders: Mapping[str, Path],
    timeout_s: float,
) -> list[ShardDigests]:
    """Merge all shards in Ray tasks of one CPU each; the results are in the order of ``shards``."""
    remote = ray.remote(num_cpus=1)(merge_shard)
    refs = [
        remote.remote(
            shard,
            {role: {name: specs[name] for name in shard.tensors} for role, specs in tensors.items()},
            variants,
            folders,
        )
        for shard in shards
    ]
    file_names = {ref: shard.file_name for ref, shard in zip(refs, shards, strict=True)}
    pending = refs
    try:
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=timeout_s)
            if not done:
                raise DeadlineError(
                    f"merge: none of {', '.join(file_names[ref] for ref in pending)} was finished in {timeout_s} s. "
                    f"A task needs 1 CPU; the cluster has {ray.cluster_resources().get('CPU', 0):g}, of which "
                    f"{ray.available_resources().get('CPU', 0):g} are free"
                )
            ray.get(done)  # raises a failed task's error at once
    finally:
        for ref in pending:
            ray.cancel(ref, force=True)
    return ray.get(refs)


def _input_summary(models: Mapping[str, Path], digests: Sequence[ShardDigests]) -> dict[str, dict[str, object]]:
    """Folder and content digest of each input.

    ``tensors_sha256`` is the SHA-256 of the lines ``NAME SHA256(tensor bytes)\\n`` in order of name: it was computed
    while merging, and stays the same when a model is saved again in other shards.
    """
    summary: dict[str, dict[str, object]] = {}
    for role, folder in models.items():
        tensors = {name: sha for part in digests for name, sha in part.inputs[role].items()}
        lines = "".join(f"{name} {sha}\n" for name, sha in sorted(tensors.items()))
        summary[role] = {
            "folder": str(folder),
            "tensors": len(tensors),
            "tensors_sha256": hashlib.sha256(lines.encode()).hexdigest(),
            "config_sha256": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
        }
    return summary


def _write_companions(folder: Path, instruct: Path, dtype: str | None) -> None:
    for pattern in COMPANION_FILES:
        for file in instruct.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    config = json.loads((instruct / "config.json").read_text())
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_index(folder: Path, shards: Sequence[Shard]) -> None:
    if len(shards) == 1:
        return
    weight_map = {name: shard.file_name for shard in shards for name in shard.tensors}
    index = {"metadata": {"total_size": sum(shard.num_bytes for shard in shards)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_manifest(
    folder: Path,
    variant: Variant,
    inputs: Mapping[str, Mapping[str, object]],
    files: Mapping[str, str],
    allow: Sequence[str],
    dtype: str | None,
) -> None:
    manifest = {
        "method": variant.method,
        "formula": FORMULAS[variant.method],
        "ratio": variant.ratio,
        "dtype": dtype or "of the instruct model",
        "allow": list(allow),
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
