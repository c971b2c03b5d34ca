"""Rewards by a function of the user's own.

    def score(samples: list[Sample]) -> list[float]:
        return [float(sample.response.strip() == sample.record["answer"]) for sample in samples]

It may be an `async def`. It runs in the reward workers, so its module must be importable there.
"""

import asyncio
import inspect
from typing import Any

from c2f_ray.data.user_function import load_function
from c2f_ray.recipe import FunctionReward
from c2f_ray.reward.samples import Sample


class FunctionScorer:
    def __init__(self, reward: FunctionReward) -> None:
        self.function = load_function("reward.function", reward.function)

    def score(self, samples: list[Sample]) -> Any:
        """What the function returns."""
        found = self.function(samples)
        return asyncio.run(_result(found)) if inspect.isawaitable(found) else found


async def _result(awaitable: Any) -> Any:
    return await awaitable
