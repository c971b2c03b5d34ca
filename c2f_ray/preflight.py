"""Everything that can be known to be wrong before any actor starts, found together and told in one error."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedConfig

from c2f_ray.data.model_folder import absolute_folder, check_model
from c2f_ray.data.prompts import PromptSet, PromptSource, build_prompt_set
from c2f_ray.data.templates import chat_template
from c2f_ray.data.tokenizer import load_tokenizer
from c2f_ray.errors import NotBuiltError, RecipeError
from c2f_ray.recipe import Recipe
from c2f_ray.recipe.schema import PPOLearner, RejectionSamplingLearner, Reward, UltraRMReward, critic_model
from c2f_ray.reward.ultrarm import check_ultrarm_folder

T = TypeVar("T")


@dataclass(frozen=True)
class Checked:
    """What the checks of `train` found out on their way."""

    prompts: PromptSet
    template: str  # that renders them
    reward: UltraRMReward
    total_steps: int


def run_folder(recipe: Recipe) -> Path:
    return Path(recipe.run.folder) / recipe.run.name


def check_train(recipe: Recipe, fresh: bool) -> Checked:
    """Raises RecipeError with every problem that `train` would meet. Writes nothing."""
    if isinstance(recipe.learner, RejectionSamplingLearner):
        raise NotBuiltError(f"learner.algorithm: {recipe.learner.algorithm!r} cannot be run yet; use 'remax' or 'ppo'")
    problems: list[str] = []

    def attempt(check: Callable[..., T], *args: Any) -> T | None:
        try:
            return check(*args)
        except NotBuiltError:
            raise
        except RecipeError as error:
            problems.extend(error.problems)
            return None

    reward = attempt(check_reward, recipe.reward)
    config = attempt(check_model, "policy.model", recipe.policy.model)
    template = attempt(training_template, recipe) if config else None
    prompts = attempt(training_prompts, recipe, template) if template else None
    if config:
        limits = ("prompts.max_tokens", recipe.prompts.max_tokens, "length.max_tokens", recipe.length.max_tokens)
        attempt(check_context, config, *limits)
        if isinstance(recipe.learner, PPOLearner):
            attempt(check_minibatches, recipe, recipe.learner)
            attempt(check_critic, recipe, recipe.learner)
    attempt(check_run_folder, run_folder(recipe), fresh)
    if problems or prompts is None or template is None or reward is None:
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
    return Checked(prompts, template, reward, total_steps)


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
    model, key = critic_model(recipe), "learner.critic.model"
    if model == recipe.policy.model:
        return
    config = check_model(key, model)
    limits = ("prompts.max_tokens", recipe.prompts.max_tokens, "length.max_tokens", recipe.length.max_tokens)
    check_context(config, *limits, owner="critic")
    if load_tokenizer(model).get_vocab() != load_tokenizer(recipe.policy.model).get_vocab():
        raise RecipeError(
            f"{key}: {model} has another vocabulary than {recipe.policy.model}, so the policy's token ids would be "
            "other words to it; use 'policy', or a model with the policy's tokenizer"
        )


def check_reward(reward: Reward) -> UltraRMReward:
    if not isinstance(reward, UltraRMReward):
        raise NotBuiltError(f"reward.kind: {reward.kind!r} cannot be run yet; use 'ultrarm'")
    config = check_model("reward.model", reward.model)
    context = getattr(config, "max_position_embeddings", reward.max_tokens)
    if reward.max_tokens > context:
        raise RecipeError(
            f"reward.max_tokens: {reward.max_tokens} is beyond the reward model's context of {context}; lower it"
        )
    if Path(reward.model).is_dir() and (wrong := check_ultrarm_folder(Path(reward.model))):
        raise RecipeError(f"reward.model: {reward.model} {wrong}")
    return reward


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
    if not fresh and (folder / "recipe.yaml").exists():
        raise RecipeError(f"run.name: {folder} holds a run already; choose another name, or start over with --fresh")


def training_template(recipe: Recipe) -> str:
    return chat_template(recipe.policy.chat_template, load_tokenizer(recipe.policy.model))


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


def with_absolute_folders(recipe: Recipe) -> Recipe:
    """The recipe with its model folders as absolute paths: an actor's working directory need not be the driver's."""
    policy = recipe.policy.model_copy(update={"model": absolute_folder(recipe.policy.model)})
    reward = recipe.reward
    if isinstance(reward, UltraRMReward):
        reward = reward.model_copy(update={"model": absolute_folder(reward.model)})
    learner = recipe.learner
    if isinstance(learner, PPOLearner) and learner.critic.model not in ("policy", "reward"):
        critic = learner.critic.model_copy(update={"model": absolute_folder(learner.critic.model)})
        learner = learner.model_copy(update={"critic": critic})
    return recipe.model_copy(update={"policy": policy, "reward": reward, "learner": learner})


def check_context(
    config: PreTrainedConfig, prompt_key: str, prompt: int, response_key: str, response: int, owner: str = "model"
) -> None:
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and prompt + response > context:
        raise RecipeError(
            f"{prompt_key} {prompt} and {response_key} {response} together are {prompt + response} tokens, beyond "
            f"the {owner}'s context of {context}; lower one of them"
        )


@dataclass(frozen=True)
class Needs:
    """What the actors of a job reserve together, and the most GPUs that one of them needs on one node."""

    gpus: int
    cpus: int
    gpus_of_one_actor: int


def check_resources(needs: Needs, cluster: dict[str, Any], largest_node_gpus: float) -> None:
    """Refuses a job that asks for more than the cluster has, however long it waited."""
    if needs.gpus_of_one_actor > largest_node_gpus and needs.gpus <= cluster.get("GPU", 0):
        raise RecipeError(
            f"one actor needs {needs.gpus_of_one_actor} GPU on one node, and the largest node has "
            f"{largest_node_gpus:g}; lower rollout.gpus_per_actor, or add larger nodes"
        )
    for name, amount in (("GPU", needs.gpus), ("CPU", needs.cpus)):
        if amount > cluster.get(name, 0):
            raise RecipeError(
                f"the recipe asks for {amount:g} {name}, and the cluster has {cluster.get(name, 0):g}; "
                "lower rollout.actors, reward.workers or learner.ranks (or what each takes), or add nodes"
            )
