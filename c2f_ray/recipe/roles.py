"""Who runs: the one table of the actors that a recipe asks for, and of the models and functions that score.

Imports neither torch nor ray, so `plan`, `doctor` and `watch` read the same table as the driver.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from c2f_ray.recipe.recipe import Recipe
from c2f_ray.recipe.reward import OneReward, Reward


@dataclass(frozen=True)
class Scorer:
    """One model or function with workers of its own. A reward is the signed sum of its scorers' scores."""

    reward: OneReward
    model: str | None = None  # the folder or hub name; None for a function
    label: str = "reward"  # in the metrics' names and in placement
    title: str = "reward"  # in tables
    key: str = "reward"  # dotted key of the model or function
    sign: float = 1.0

    @property
    def gpus(self) -> int:
        """Returns the GPUs of one worker."""
        return self.reward.gpus


@dataclass(frozen=True)
class Role:
    """``count`` actors of one kind, each on ``gpus`` GPUs of one node, or on a CPU."""

    name: str
    count: int
    gpus: int

    @property
    def bundle(self) -> dict[str, float]:
        """Returns Ray's resources of one actor."""
        return {"GPU": self.gpus} if self.gpus else {"CPU": 1}

    def __str__(self) -> str:
        return f"{self.name}: {self.count} x {f'{self.gpus} GPU' if self.gpus else '1 CPU'}"


@dataclass(frozen=True)
class Needs:
    """What the actors of a job reserve together."""

    gpus: int
    cpus: int


def scorers_of(reward: Reward) -> dict[str, list[Scorer]]:
    """Returns the scorers of each part of a reward, by the part's name."""
    return {
        name: _scorers(name, reward.part_key(name), f"reward {name}" if reward.is_sum else "reward", part.reward)
        for name, part in reward.named_parts().items()
    }


def _scorers(name: str, key: str, title: str, reward: OneReward) -> list[Scorer]:
    if not reward.model_signs:
        return [Scorer(reward, None, name, title, f"{key}.function")]
    found = []
    for field, sign in reward.model_signs.items():
        side = field.removesuffix("_model") if len(reward.model_signs) > 1 else ""
        label, named = (f"{name}_{side}", f"{title}, {side}") if side else (name, title)
        found.append(Scorer(reward, getattr(reward, field), label, named, f"{key}.{field}", sign))
    return found


def scorers(recipe: Recipe) -> list[Scorer]:
    """Returns all scorers of a recipe's reward, in the order of its parts."""
    return [scorer for part in scorers_of(recipe.reward).values() for scorer in part]


def reward_roles(recipe: Recipe) -> list[Role]:
    """Returns the roles of `score`."""
    return [Role(f"reward {scorer.label}", scorer.reward.workers, scorer.gpus) for scorer in scorers(recipe)]


def evaluate_roles(recipe: Recipe) -> list[Role]:
    """Returns the roles of `evaluate`."""
    return [Role("rollout", recipe.rollout.actors, recipe.rollout.gpus_per_actor), *reward_roles(recipe)]


def train_roles(recipe: Recipe) -> list[Role]:
    """Returns the roles of `train`."""
    return [*evaluate_roles(recipe), Role("learner", recipe.learner.ranks, recipe.learner.gpus_per_rank)]


def needs_of(roles: list[Role]) -> Needs:
    """Returns what the actors of these roles reserve together. An actor without a GPU takes a CPU."""
    return Needs(
        gpus=sum(role.count * role.gpus for role in roles),
        cpus=sum(role.count for role in roles if role.gpus == 0),
    )


def named_models(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yields the dotted key and the folder or hub name of every model that a recipe names."""
    yield "policy.model", recipe.policy.model
    for scorer in scorers(recipe):
        if scorer.model is not None:
            yield scorer.key, scorer.model
    if recipe.learner.names_a_critic and recipe.critic_model is not None:
        yield "learner.critic.model", recipe.critic_model
    if recipe.merge:
        yield "merge.instruct", recipe.merge.instruct
