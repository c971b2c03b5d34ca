"""Everything that can be known to be wrong before any actor starts, found together and told in one error."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from c2f_ray.data.inputs import heldout_prompts, run_folder, training_prompts, with_absolute_folders
from c2f_ray.data.model_folder import check_context, check_model
from c2f_ray.data.prompts import PromptSet, prompt_groups
from c2f_ray.data.templates import chat_template
from c2f_ray.data.tokenizer import load_tokenizer
from c2f_ray.driver.checkpoints import Checkpoint, newest_checkpoint
from c2f_ray.errors import RecipeError
from c2f_ray.learner.packing import obstacle
from c2f_ray.recipe import (
    PPOLearner,
    Recipe,
    load_recipe,
)
from c2f_ray.reward.check import check_reward

T = TypeVar("T")


@dataclass(frozen=True)
class Checked:
    """What the checks of `train` found out on their way."""

    prompts: PromptSet
    groups: list[list[int]]  # rows of the prompts; steps draw from each group in turn
    heldout: PromptSet | None  # what rejection sampling judges its rounds by
    template: str  # that renders them
    total_steps: int
    policy_config: dict[str, Any]  # what the policy's architecture is
    resume: Checkpoint | None  # to go on from
    notes: list[str]  # what to tell before the run begins


def check_train(recipe: Recipe, fresh: bool) -> Checked:
    """Raises RecipeError with every problem that `train` would meet. Writes nothing."""
    problems: list[str] = []

    def attempt(check: Callable[..., T], *args: Any) -> T | None:
        try:
            return check(*args)
        except RecipeError as error:
            problems.extend(error.problems)
            return None

    attempt(check_reward, recipe.reward)
    attempt(check_wandb, recipe.run.wandb)
    config = attempt(check_model, "policy.model", recipe.policy.model)
    template = attempt(training_template, recipe) if config else None
    prompts = attempt(training_prompts, recipe, template) if template else None
    groups = attempt(prompt_groups, prompts, recipe.prompts.uniform_over) if prompts else None
    heldout = None
    if template and recipe.learner.needs_heldout:
        heldout = attempt(heldout_prompts, recipe, template)
    if config:
        limits = ("prompts.max_tokens", recipe.prompts.max_tokens, "length.max_tokens", recipe.length.max_tokens)
        attempt(check_context, config, *limits)
        attempt(check_packing, recipe, "policy.model", config)
        attempt(check_lora, recipe, config)
        if isinstance(recipe.learner, PPOLearner):
            attempt(check_minibatches, recipe, recipe.learner)
            attempt(check_critic, recipe, recipe.learner)
    attempt(check_run_folder, run_folder(recipe), fresh)
    architecture = architecture_of(config) if config else {}
    continued = attempt(check_continued, recipe, architecture) if config and not fresh and not problems else (None, [])
    if problems or prompts is None or template is None or continued is None or groups is None:
        raise RecipeError(*problems)
    total_steps = recipe.run.steps
    if total_steps is None:
        assert recipe.run.epochs is not None  # the recipe has exactly one of the two
        total_steps = ceil(recipe.run.epochs * len(prompts) / recipe.prompts.per_step)
    if isinstance(recipe.learner, PPOLearner) and recipe.learner.critic.warmup_steps >= total_steps:
        raise RecipeError(
            f"learner.critic.warmup_steps: {recipe.learner.critic.warmup_steps} of the run's {total_steps} steps leave "
            "none for the policy; lower it, or train longer"
        )
    return Checked(prompts, groups, heldout, template, total_steps, architecture, *continued)


def check_wandb(project: str | None) -> None:
    if project is None:
        return
    if find_spec("wandb") is None:
        raise RecipeError(
            f"run.wandb: {project!r} needs the package wandb, which is not installed; install it, or leave this out"
        )
    if "WANDB_API_KEY" not in os.environ and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        raise RecipeError(
            f"run.wandb: {project!r} needs the environment variable WANDB_API_KEY, or WANDB_MODE=offline; it is not set"
        )


def check_minibatches(recipe: Recipe, learner: PPOLearner) -> None:
    samples = recipe.prompts.per_step * recipe.rollout.samples_per_prompt
    what = f"learner.minibatches: {learner.minibatches}: a step has {samples} samples, prompts.per_step times"
    what += " rollout.samples_per_prompt"
    if samples % learner.minibatches:
        raise RecipeError(f"{what}, which it does not divide evenly; choose a divisor")
    if samples // learner.minibatches < learner.ranks:
        raise RecipeError(
            f"{what}, so a minibatch has {samples // learner.minibatches} for {learner.ranks} ranks; lower minibatches "
            "or learner.ranks, or draw more samples"
        )


def check_critic(recipe: Recipe, learner: PPOLearner) -> None:
    """A critic that starts from another model than the policy must read the same token ids, and as many of them."""
    model, key = recipe.critic_model, "learner.critic.model"
    if model is None or model == recipe.policy.model:
        return
    config = check_model(key, model)
    limits = ("prompts.max_tokens", recipe.prompts.max_tokens, "length.max_tokens", recipe.length.max_tokens)
    check_context(config, *limits, owner="critic")
    check_packing(recipe, key, config)
    if load_tokenizer(model).get_vocab() != load_tokenizer(recipe.policy.model).get_vocab():
        raise RecipeError(
            f"{key}: {model} has another vocabulary than {recipe.policy.model}, so the policy's token ids would be "
            "other words to it; use 'policy', or a model with the policy's tokenizer"
        )


def check_packing(recipe: Recipe, key: str, config: PreTrainedConfig) -> None:
    if recipe.learner.packs and (what := obstacle(config)):
        raise RecipeError(f"{key}: it has {what}, which cannot be packed; set learner.packing to false")


def check_lora(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Each target must be the name, or the end of the name, of linear layers that nothing else shares weights with."""
    if recipe.learner.lora is None:
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if config.tie_word_embeddings:
        linear = {name for name in linear if model.get_submodule(name) is not model.get_output_embeddings()}
    unknown = [t for t in recipe.learner.lora.targets if not any(f".{name}".endswith(f".{t}") for name in linear)]
    if unknown:
        raise RecipeError(
            f"learner.lora.targets: {', '.join(unknown)}: no such linear layer in {recipe.policy.model}; choose from "
            f"{', '.join(sorted({name.rpartition('.')[2] for name in linear}))}"
        )


def check_run_folder(folder: Path, fresh: bool) -> None:
    """Only a run's own folder is ever removed, and only when that was asked for."""
    parts = [folder, *folder.parents]
    file = next((part for part in parts if part.exists() and not part.is_dir()), None)
    if file is not None:
        raise RecipeError(f"run.folder: {file} is a file; choose another folder")
    if fresh and folder.exists() and not (folder / "recipe.yaml").is_file():
        raise RecipeError(
            f"run.name: {folder} is not a run's folder, so --fresh does not remove it; choose another name"
        )


def check_continued(recipe: Recipe, architecture: dict[str, Any]) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint that the run's folder goes on from, and what to tell about it.

    Raises RecipeError when the folder's run was of another kind, or when none of its checkpoints can be used.
    """
    folder = run_folder(recipe)
    if not (folder / "recipe.yaml").is_file():
        return None, []
    start_over = "choose another run.name, or start over with --fresh"
    changed = changed_settings(load_recipe(folder / "recipe.yaml"), recipe)
    if fixed := [line for key, line in changed.items() if key.startswith(FIXED_IN_A_RUN)]:
        raise RecipeError(*(f"{line}: the run at {folder} cannot change it any more; {start_over}" for line in fixed))
    checkpoint, notes = newest_checkpoint(folder)
    if checkpoint is None:
        if any(folder.glob("checkpoints/step_??????")):
            whole = f"run.name: {folder} has no checkpoint that can be used; {start_over}"
            raise RecipeError(*(f"run.name: {note}" for note in notes), whole)
        if (folder / "coarse").exists():
            raise RecipeError(f"run.name: {folder} holds a finished run without checkpoints; {start_over}")
        return None, [*notes, f"{folder} has no checkpoint yet: the run starts from its first step"]
    keys = {**architecture, **checkpoint.policy}
    if other := [key for key in keys if architecture.get(key) != checkpoint.policy.get(key)]:
        raise RecipeError(
            *(
                f"policy.model: {key} is {architecture.get(key)}, and {checkpoint.policy.get(key)} in the model that "
                f"{checkpoint.folder} was trained from; {start_over}"
                for key in other
            )
        )
    notes += [
        f"changed since the run was last started: {line} (--fresh, or another run.name, starts anew)"
        for line in changed.values()
    ]
    return checkpoint, [*notes, f"continues from {checkpoint.folder}"]


# A run with another value of these would be another run: its data, its order or its models.
FIXED_IN_A_RUN = ("run.seed", "policy.", "prompts.", "learner.algorithm", "learner.critic.model", "learner.lora")


def changed_settings(before: Recipe, now: Recipe) -> dict[str, str]:
    """A line for each dotted key whose value differs. Model folders are compared as absolute paths."""
    old, new = (dict(_leaves("", with_absolute_folders(recipe).model_dump())) for recipe in (before, now))
    return {
        key: f"{key}: {old.get(key)!r} before, {new.get(key)!r} now"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    }


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, part in value.items():
        yield from _leaves(f"{prefix}.{key}" if prefix else key, part)


def architecture_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What two models must agree on to have the same weights, as JSON."""
    volatile = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
    fields = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in fields.items() if key not in volatile}


def training_template(recipe: Recipe) -> str:
    return chat_template(recipe.policy.chat_template, load_tokenizer(recipe.policy.model))
