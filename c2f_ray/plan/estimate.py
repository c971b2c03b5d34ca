"""What a recipe will need: memory by role, where its actors go, seconds of a step, the better split, and disk."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from operator import itemgetter
from typing import Any

from c2f_ray.errors import RecipeError
from c2f_ray.plan.clusters import Actor, Gpu, Nodes, actors_of, place
from c2f_ray.plan.memory import (
    GIB,
    MASTER,
    MOMENTS,
    WIDTH,
    Engine,
    Memory,
    engine_memory,
    learner_memory,
    reward_memory,
    trainable,
)
from c2f_ray.plan.model import ModelShape, read_model
from c2f_ray.plan.schedule import Models, Step, step, transfer_bytes
from c2f_ray.recipe import ModelReward, Recipe
from c2f_ray.recipe.roles import scorers


@dataclass(frozen=True)
class Role:
    name: str  # `rollout`, what `scorers` says, `learner`
    gpus: int  # of one actor
    memory: Memory  # of one of its GPUs, or of its process where it has none
    room: float  # bytes that it may take


@dataclass(frozen=True)
class Estimate:
    recipe: Recipe
    models: Models
    nodes: Nodes
    roles: list[Role]
    engines: dict[int, Engine]  # by the length limit, ascending
    steps: dict[int, Step]  # the same; empty without GPUs, for whose rates there are no data sheets
    total_steps: int | None  # of the run, where the recipe alone tells
    placed: list[list[Actor]]  # by node
    split: tuple[dict[str, int], float] | None  # actors by role that make the quickest step, and its seconds
    disk: dict[str, float]  # bytes
    transfer: float  # bytes
    problems: list[str]  # why it cannot run so, each with what to change


def read_models(recipe: Recipe) -> Models:
    """Raises RecipeError with the problems of all of them."""
    problems: list[str] = []

    def read(key: str, model: str | None) -> ModelShape | None:
        try:
            return read_model(key, model) if model else None
        except RecipeError as error:
            problems.extend(error.problems)
            return None

    policy = read("policy.model", recipe.policy.model)
    critic = policy
    if recipe.critic_model != recipe.policy.model:
        critic = read("learner.critic.model", recipe.critic_model)
    scoring = [read(each.key, each.model) for each in scorers(recipe)]
    if problems or policy is None:
        raise RecipeError(*problems)
    return Models(policy, critic if recipe.learner.has_critic else None, scoring)


def estimate(recipe: Recipe, nodes: Nodes, network: float) -> Estimate:
    """``network``: bytes a second between nodes."""
    models = read_models(recipe)
    limits = sorted({recipe.length.first_tokens, recipe.length.max_tokens})
    roles = roles_of(recipe, models, nodes.gpu)
    placed, left = place(actors_of(recipe), nodes.nodes)
    per_node = max((node.gpus for node in nodes.nodes), default=0)
    engines = {limit: engine_memory(recipe, models.policy, nodes.gpu.memory, limit) for limit in limits}
    on_gpus = recipe.learner.gpus_per_rank > 0
    steps = {}
    split = None
    if on_gpus:
        steps = {limit: step(recipe, models, nodes.gpu, engines[limit], limit, network, per_node) for limit in limits}
        split = best_split(recipe, models, nodes, network, per_node)
    problems = list(_memory_problems(recipe, models, nodes.gpu, roles)) if on_gpus else []
    if left:
        problems.append(_no_room(left, nodes))
    return Estimate(
        recipe=recipe,
        models=models,
        nodes=nodes,
        roles=roles,
        engines=engines,
        steps=steps,
        total_steps=_total_steps(recipe),
        placed=placed,
        split=split,
        disk=disk(recipe, models),
        transfer=transfer_bytes(recipe, models.policy),
        problems=problems,
    )


def roles_of(recipe: Recipe, models: Models, gpu: Gpu) -> list[Role]:
    rollout, learner = recipe.rollout, recipe.learner
    engine = engine_memory(recipe, models.policy, gpu.memory, recipe.length.max_tokens)
    sequence = recipe.prompts.max_tokens + recipe.length.max_tokens
    cached = WIDTH[recipe.policy.dtype] * models.policy.kv_elements * sequence / max(1, rollout.gpus_per_actor)
    held = Memory(engine.memory.gpu | {"KV cache of one sequence": cached}, {})
    roles = [Role("rollout", rollout.gpus_per_actor, held, rollout.memory * gpu.memory)]
    for scorer, shape in zip(scorers(recipe), models.reward, strict=True):
        share = getattr(scorer.reward, "memory", 1.0)  # an engine's
        roles.append(Role(scorer.title, scorer.gpus, reward_memory(scorer, shape), share * gpu.memory))
    learning = learner_memory(recipe, models.policy, models.critic)
    return [*roles, Role("learner", learner.gpus_per_rank, learning, gpu.memory)]


def _memory_problems(recipe: Recipe, models: Models, gpu: Gpu, roles: list[Role]) -> Iterator[str]:
    for number, role in enumerate(roles):
        if role.gpus == 0 or role.memory.total <= role.room:
            continue
        what = f"{role.name}: needs {role.memory.total / GIB:.0f} GiB of a GPU's {role.room / GIB:.0f}"
        changed = recipe
        told: dict[str, str] = {}
        for section, settings in _changes(role.name, recipe):
            lighter = _with(changed, section, **settings)
            again = roles_of(lighter, models, gpu)[number]
            if again.memory.total >= roles_of(changed, models, gpu)[number].memory.total:
                continue
            changed = lighter
            told |= {f"{section}.{key}": str(value).lower() for key, value in settings.items()}
            if again.memory.total <= again.room:
                changes = " ".join(f"{key}={value}" for key, value in told.items())
                yield f"{what}; with {changes} it needs {again.memory.total / GIB:.0f}"
                break
        else:
            yield f"{what}; no setting makes it fit: take larger GPUs, or a smaller model"


def _changes(role: str, recipe: Recipe) -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings that need less memory, those that cost least first."""
    longest = recipe.prompts.max_tokens + recipe.length.max_tokens
    if role == "rollout":
        yield from (("rollout", {"gpus_per_actor": gpus}) for gpus in (2, 4, 8))
    elif role.startswith("reward"):
        reward = recipe.reward
        if isinstance(reward, ModelReward):
            yield "reward", {"tokens_per_batch": min(reward.tokens_per_batch, reward.max_tokens)}
        if reward.generates:
            yield from (("reward", {"gpus_per_worker": gpus}) for gpus in (2, 4, 8))
    else:
        yield "learner", {"gradient_checkpointing": True}
        yield "learner", {"tokens_per_microbatch": max(longest, recipe.learner.tokens_per_microbatch // 4)}
        yield "learner", {"zero_stage": 3}
        yield "learner", {"offload": "optimizer"}
        yield from (("learner", {"ranks": recipe.learner.ranks * times}) for times in (2, 4, 8, 16))
        yield "learner", {"offload": "all"}


def _with(recipe: Recipe, section: str, **settings: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=settings)})


def _no_room(left: list[Actor], nodes: Nodes) -> str:
    gpus = sum(actor.gpus for actor in left)
    what = f"{len(left)} actors ({', '.join(sorted({actor.role for actor in left}))}) find no room"
    has = f"the cluster has {nodes.gpus} GPUs, at the most {max((n.gpus for n in nodes.nodes), default=0)} on a node"
    missing = f"{gpus} GPUs" if gpus else f"{sum(actor.cpus for actor in left)} CPUs"
    return (
        f"placement: {what}: {missing} more are needed, and {has}; add nodes, or lower rollout.actors, reward.workers "
        "or learner.ranks"
    )


def best_split(
    recipe: Recipe, models: Models, nodes: Nodes, network: float, per_node: int
) -> tuple[dict[str, int], float] | None:
    """The actors that make the quickest step at the longest limit on the recipe's GPUs, or on those that there are."""
    rollout, learner, limit = recipe.rollout, recipe.learner, recipe.length.max_tokens
    # GPUs that one worker more, of each model that scores, takes; the parts of a sum stay as they are.
    unit = 0 if recipe.reward.is_sum else sum(scorer.gpus for scorer in scorers(recipe))
    total = min(nodes.gpus, sum(actor.gpus for actor in actors_of(recipe)))
    free = total if unit else total - sum(actor.gpus for actor in actors_of(recipe) if actor.role == "reward")
    stride = ceil(total / 64)  # of more GPUs than that a coarser choice is enough
    samples = recipe.prompts.per_step * rollout.samples_per_prompt
    most_ranks = learner.most_ranks(samples)
    engine = engine_memory(recipe, models.policy, nodes.gpu.memory, limit)
    if engine.in_flight == 0:
        return None
    found: list[tuple[dict[str, int], float]] = []
    for ranks in range(1, min(free, most_ranks + 1), stride):
        learning = _with(recipe, "learner", ranks=ranks)
        if learner_memory(learning, models.policy, models.critic).total > nodes.gpu.memory:
            continue
        for workers in range(1, (free - ranks) // unit + 1, stride) if unit else [0]:
            actors = (free - ranks - workers * unit) // rollout.gpus_per_actor
            if actors < 1:
                continue
            other = _with(learning, "rollout", actors=actors)
            counts = {"rollout.actors": actors, "learner.ranks": ranks}
            if unit:
                other = _with(other, "reward", workers=workers)
                counts["reward.workers"] = workers
            found.append((counts, step(other, models, nodes.gpu, engine, limit, network, per_node).seconds))
    return min(found, key=itemgetter(1), default=None)


def disk(recipe: Recipe, models: Models) -> dict[str, float]:
    """Bytes that the run's folder grows to, without trajectories: a text is some kilobytes."""
    learning = trainable(models.policy, recipe.learner.lora) + (models.critic.trunk if models.critic else 0)
    one = (MASTER + MOMENTS) * learning
    keep = recipe.checkpoints
    export = WIDTH[recipe.policy.dtype] * models.policy.parameters
    found = {
        f"checkpoints, {keep.keep_last + keep.keep_best} kept and 1 on its way": one
        * (keep.keep_last + keep.keep_best + 1),
        "coarse actor": export,
    }
    if recipe.learner.keeps_start:
        found["weights at the start"] = MASTER * learning
    if recipe.merge:
        count = len(recipe.merge.methods) * (len(recipe.merge.ratios) + len(recipe.merge.schedules))
        dtype = recipe.merge.dtype or recipe.policy.dtype
        found[f"{count} fine actors"] = count * WIDTH[dtype] * models.policy.parameters
    return found


def _total_steps(recipe: Recipe) -> int | None:
    if recipe.run.steps is not None:
        return recipe.run.steps
    if recipe.prompts.num_prompts is None or recipe.run.epochs is None:
        return None
    return ceil(recipe.run.epochs * recipe.prompts.num_prompts / recipe.prompts.per_step)
