"""What scores in a recipe: each model, or function, that has workers of its own."""

from collections.abc import Iterator
from dataclasses import dataclass

from c2f_ray.recipe.schema import (
    FunctionReward,
    LogRatioReward,
    Recipe,
    SumReward,
    UltraRMReward,
    reward_parts,
)


@dataclass(frozen=True)
class Scoring:
    name: str  # `reward`, with the name of a sum's part, or with the side of a log ratio
    key: str  # dotted, of the model
    model: str | None  # a function has none
    reward: UltraRMReward | LogRatioReward | FunctionReward

    @property
    def gpus(self) -> int:
        """Of one worker."""
        return 0 if isinstance(self.reward, FunctionReward) else self.reward.gpus_per_worker


def scorings(recipe: Recipe) -> Iterator[Scoring]:
    for name, part in reward_parts(recipe.reward).items():
        reward, summed = part.reward, isinstance(recipe.reward, SumReward)
        title = f"reward {name}" if summed else "reward"
        key = f"reward.parts.{name}.reward" if summed else "reward"
        match reward:
            case FunctionReward():
                yield Scoring(title, f"{key}.function", None, reward)
            case UltraRMReward():
                yield Scoring(title, f"{key}.model", reward.model, reward)
            case LogRatioReward():
                yield Scoring(f"{title}, policy", f"{key}.policy_model", reward.policy_model, reward)
                yield Scoring(f"{title}, reference", f"{key}.reference_model", reward.reference_model, reward)
