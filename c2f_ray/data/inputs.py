"""What a recipe names in the file system: the run's folder, model folders and sources of prompts."""

from pathlib import Path

from c2f_ray.data.model_folder import absolute_folder
from c2f_ray.data.prompts import PromptSet, PromptSource, build_prompt_set
from c2f_ray.data.tokenizer import load_tokenizer
from c2f_ray.recipe import Evaluate, Recipe, WinRate


def run_folder(recipe: Recipe) -> Path:
    """Returns the run's folder."""
    return Path(recipe.run.folder) / recipe.run.name


def evaluation_source(recipe: Recipe, key: str, settings: Evaluate | WinRate) -> PromptSource:
    """Returns a source of prompts that are read as those of training are."""
    return PromptSource(
        key=key,
        source=settings.prompts,
        split=settings.split,
        field=settings.field,
        turns=recipe.prompts.turns,
        system=recipe.prompts.system,
        num_prompts=settings.num_prompts,
        seed=recipe.run.seed,
    )


def with_absolute_folders(recipe: Recipe) -> Recipe:
    """Returns the recipe with absolute model folders: an actor's working directory need not be the driver's."""
    policy = recipe.policy.model_copy(update={"model": absolute_folder(recipe.policy.model)})
    reward, learner = recipe.reward.with_models(absolute_folder), recipe.learner.with_models(absolute_folder)
    return recipe.model_copy(update={"policy": policy, "reward": reward, "learner": learner})


def training_prompts(recipe: Recipe, template: str) -> PromptSet:
    tokenizer = load_tokenizer(recipe.policy.model)
    settings = recipe.prompts
    source = PromptSource(
        key="prompts.source",
        source=settings.source,
        split=settings.split,
        field=settings.field,
        turns=settings.turns,
        system=settings.system,
        num_prompts=settings.num_prompts,
        seed=recipe.run.seed,
    )
    return build_prompt_set(source, tokenizer, template, settings.max_tokens, settings.too_long)


def heldout_prompts(recipe: Recipe, template: str) -> PromptSet:
    assert recipe.evaluate is not None  # the recipe is refused otherwise
    source = evaluation_source(recipe, "evaluate.prompts", recipe.evaluate)
    tokenizer = load_tokenizer(recipe.policy.model)
    return build_prompt_set(source, tokenizer, template, recipe.prompts.max_tokens, "refuse")
