"""What a merge will read and write, with everything that can be known to be wrong found before Ray starts."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from xxhash import xxh3_128

from c2f_ray.data.inputs import run_folder
from c2f_ray.data.model_folder import SMALL_FILES
from c2f_ray.data.shards import MAX_SHARD_BYTES, Shard, plan_shards, tensor_bytes
from c2f_ray.errors import RecipeError
from c2f_ray.merging.compatibility import Models, check_inputs
from c2f_ray.merging.methods import ROLES, Settings
from c2f_ray.merging.ratios import schedule_ratios
from c2f_ray.merging.shards import Variant
from c2f_ray.recipe import MERGE_METHODS_WITH, Merge, Recipe

SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
VERSIONS = ("c2f-ray", "torch", "safetensors", "transformers")
MANIFEST = "merge.json"  # in each fine actor's folder
BEGUN = "plan.json"  # beside work that is not complete: of which merge it is
NUM_SHARDS = 32  # about: as many tasks can work at the same time
SHARD_BYTES = (2**25, MAX_SHARD_BYTES)  # least and most


@dataclass(frozen=True)
class MergePlan:
    """A merge that can be done."""

    models: Models
    recipe: Merge
    settings: Settings
    variants: list[Variant]
    shards: list[Shard]  # of every variant
    out: Path  # absolute; each variant's folder will be in it, by name

    @property
    def aside(self) -> Path:
        """Where the work is done until all of it is complete."""
        return self.out.with_name(self.out.name + ".partial")

    @property
    def published(self) -> Path:
        """In `aside`: says that all variants are complete and are being renamed."""
        return self.aside / "complete"

    @cached_property
    def todo(self) -> list[Variant]:
        """Those that are not there yet."""
        return [variant for variant in self.variants if not (self.out / variant.name).exists()]

    @cached_property
    def identity(self) -> dict[str, str]:
        """By variant, a digest of all that its weights, tokenizer and configuration depend on."""
        inputs = {
            role: {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in self._input_files(role)}
            for role in self.models.folders
        }
        common = {
            "dtype": self.recipe.dtype,
            "shards": [asdict(shard) for shard in self.shards],
            "versions": self.versions,
        }
        return {
            variant.name: xxh3_128(
                json.dumps(
                    {
                        **common,
                        **self.settings_of(variant),
                        "method": variant.method,
                        "ratios": variant.ratios,
                        # Rows that are matched by token are those that all models have.
                        "inputs": inputs
                        if self.models.rows
                        else {role: inputs[role] for role in ROLES[variant.method]},
                    }
                ).encode()
            ).hexdigest()
            for variant in self.variants
        }

    @cached_property
    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in VERSIONS}

    def settings_of(self, variant: Variant) -> dict[str, float]:
        """What its method takes beside a ratio."""
        names = [name for name, users in MERGE_METHODS_WITH.items() if variant.method in users]
        return {
            name: getattr(self.settings, name) for name in [*names, *(["seed"] if variant.method == "dare" else [])]
        }

    def _input_files(self, role: str) -> list[Path]:
        folder = self.models.folders[role]
        weights = {spec.file for spec in self.models.tensors[role].values()}
        return sorted(weights | {path for name in SMALL_FILES for path in folder.glob(name) if path.is_file()})

    def goes_on(self) -> bool:
        """Whether an earlier merge of the same has left its work on all that is still to do."""
        path = self.aside / BEGUN
        begun = path.is_file() and json.loads(path.read_text()) == self.identity
        return begun and all((self.aside / variant.name).is_dir() for variant in self.todo)


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
    models = check_inputs({role: model for role, model in given.items() if role in needed}, settings.allow)
    specs = models.tensors["instruct"]
    dtype = SAFETENSORS_NAMES[settings.dtype] if settings.dtype else None
    tensors = {name: (dtype or spec.dtype, spec.shape) for name, spec in specs.items()}
    least, most = SHARD_BYTES
    total = sum(tensor_bytes(*tensor) for tensor in tensors.values())
    plan = MergePlan(
        models,
        settings,
        Settings(settings.scale, settings.instruct_density, settings.coarse_density, recipe.run.seed),
        _variants(settings, list(specs)),
        plan_shards(tensors, min(most, max(least, total // NUM_SHARDS))),
        (folder / "fine").resolve(),
    )
    _check_outputs(plan)
    return plan


def _variants(settings: Merge, tensors: Sequence[str]) -> list[Variant]:
    ratios = {f"{ratio:g}": dict.fromkeys(tensors, ratio) for ratio in settings.ratios}
    schedules = {
        schedule.name: schedule_ratios(f"merge.schedules.{i}", schedule, tensors)
        for i, schedule in enumerate(settings.schedules)
    }
    variants = []
    for method in settings.methods:
        variants += [Variant(method, label, by_tensor) for label, by_tensor in (ratios | schedules).items()]
    labels = [f"{ratio:g}" for ratio in settings.ratios] + [schedule.name for schedule in settings.schedules]
    twice = sorted({f"{method}-{label}" for method in settings.methods for label in labels if labels.count(label) > 1})
    twice += sorted({method for method in settings.methods if settings.methods.count(method) > 1})
    if twice:
        raise RecipeError(*(f"merge: {name} is asked for twice" for name in twice))
    return variants


def _check_outputs(plan: MergePlan) -> None:
    problems = [
        f"merge: {plan.out / variant.name} is there, of other inputs, settings or versions, and is not overwritten: "
        "remove it, or give other merge.ratios"
        for variant in plan.variants
        if variant not in plan.todo and _identity_of(plan.out / variant.name) != plan.identity[variant.name]
    ]
    existing = next(folder for folder in (plan.out, *plan.out.parents) if folder.is_dir())
    left = sum(path.stat().st_size for path in plan.aside.rglob("*") if path.is_file())  # to be used, or removed
    needed_gib = (len(plan.todo) * sum(shard.num_bytes for shard in plan.shards) - left) / 2**30
    free_gib = shutil.disk_usage(existing).free / 2**30
    if needed_gib > free_gib:
        problems.append(
            f"merge: {len(plan.todo)} models need {needed_gib:.1f} GiB and {existing} has {free_gib:.1f} free: "
            "take fewer merge.ratios, or another folder"
        )
    if problems:
        raise RecipeError(*problems)


def _identity_of(folder: Path) -> str | None:
    """What a fine actor's folder says that it was made of; None where that cannot be read."""
    try:
        return json.loads((folder / MANIFEST).read_text()).get("identity")
    except (OSError, ValueError):
        return None
