"""Rewards by a function of the user's own.

    def score(samples: list[Sample]) -> list[float]:
        return [float(sample.response.strip() == sample.record["answer"]) for sample in samples]

It may be an `async def`. It runs in the reward workers, so its module must be importable there.
"""

import asyncio
import inspect
import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np

from c2f_ray.data.prompts import Messages
from c2f_ray.data.trajectory import Float32
from c2f_ray.errors import BadRewardError
from c2f_ray.functions import load_function
from c2f_ray.recipe.schema import FunctionReward


@dataclass(frozen=True)
class Sample:
    messages: Messages  # the prompt
    response: str
    finished: bool  # it ended by itself, and was not cut by the limit
    record: dict[str, Any]  # the prompt's other fields, such as its answer


class FunctionScorer:
    def __init__(self, reward: FunctionReward) -> None:
        self.name = reward.function
        self.function = load_function("reward.function", reward.function)

    def score(self, samples: list[Sample]) -> Float32:
        """One finite float32 for each sample. Raises BadRewardError, which names the function and the culprit."""
        found = self.function(samples)
        if inspect.isawaitable(found):
            found = asyncio.run(_result(found))
        rewards = list(found) if isinstance(found, list | tuple | np.ndarray) else found
        if not isinstance(rewards, list) or len(rewards) != len(samples):
            said = f"{len(rewards)} rewards" if isinstance(rewards, list) else f"a {type(rewards).__name__}"
            raise BadRewardError(f"{self.name} returned {said} for {len(samples)} samples; return a list of as many")
        for reward, sample in zip(rewards, samples, strict=True):
            if not isinstance(reward, numbers.Real) or not np.isfinite(float(reward)):
                raise BadRewardError(f"{self.name} returned {reward!r} for the response {sample.response[:200]!r}")
        return np.array(rewards, dtype=np.float32)


async def _result(awaitable: Any) -> Any:
    return await awaitable
