"""What a merge will read and write, with everything that can be known to be wrong found before Ray starts."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from c2f_ray.data.shards import MAX_SHARD_BYTES, Shard, plan_shards
from c2f_ray.errors import RecipeError
from c2f_ray.merging.compatibility import Input, check_inputs
from c2f_ray.merging.methods import ROLES
from c2f_ray.merging.shards import Variant
from c2f_ray.preflight import run_folder
from c2f_ray.recipe import Recipe

SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class MergePlan:
    """A merge that can be done."""

    inputs: dict[str, Input]  # by role
    variants: list[Variant]
    shards: list[Shard]  # of every variant
    out: Path  # absolute; each variant's folder will be in it, by name
    allow: list[str]
    dtype: str | None  # of the files written, a recipe's name; each tensor's in the instruct model when None


def check_merge(recipe: Recipe) -> MergePlan:
    """Raises RecipeError with the problems that `merge` would meet. Downloads what is on the hub; writes nothing."""
    settings = recipe.merge
    if settings is None:
        raise RecipeError("merge: missing; it names the instruct model and the ratios")
    folder = run_folder(recipe)
    coarse = settings.coarse or str(folder / "coarse")
    if settings.coarse is None and not Path(coarse).is_dir():
        raise RecipeError(f"merge.coarse: {coarse}: no coarse actor there; run `c2f-ray train` with this recipe first")
    given = {
        "base": ("merge.base", settings.base) if settings.base else ("policy.model", recipe.policy.model),
        "coarse": ("merge.coarse", coarse),
        "instruct": ("merge.instruct", settings.instruct),
    }
    needed = {role for method in settings.methods for role in ROLES[method]}
    inputs = check_inputs({role: model for role, model in given.items() if role in needed}, settings.allow)
    variants = [Variant(method, ratio) for method in settings.methods for ratio in settings.ratios]
    dtype = SAFETENSORS_NAMES[settings.dtype] if settings.dtype else None
    tensors = {name: (dtype or spec.dtype, spec.shape) for name, spec in inputs["instruct"].tensors.items()}
    shards = plan_shards(tensors, MAX_SHARD_BYTES)
    out = (folder / "fine").resolve()
    _check_outputs(variants, shards, out)
    return MergePlan(inputs, variants, shards, out, settings.allow, settings.dtype)


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
