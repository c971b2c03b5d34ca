"""Policy gradients with a baseline from the other samples of the same draw: RLOO's and GRPO's (without its ratio)."""

from functools import partial
from typing import Any, cast

import torch

from c2f_ray.algorithms.base import Algorithm, ScoredStep, load_policy, load_reference
from c2f_ray.algorithms.reinforce import ReinforceStep
from c2f_ray.learner.accumulator import MetricsAccumulator
from c2f_ray.learner.batching import Samples, UpdateBatch
from c2f_ray.losses import baselines, remax
from c2f_ray.recipe import GroupBaselineLearner, Recipe


class GroupBaseline(Algorithm):
    """One optimizer step on a step's rollouts. The same on every rank but for ``rank``."""

    @staticmethod
    def batch(step: ScoredStep, learner: Any, seed: list[int]) -> UpdateBatch:
        """Returns all trajectories, with the baseline that ``learner.baseline`` names."""
        baseline, scale = baselines.group_baseline(step.draw, step.reward, learner.baseline)
        return UpdateBatch(step.info.sample_id, step.reward, baseline, scale)

    def __init__(self, recipe: Recipe, rank: int, total_updates: int) -> None:
        self.learner = cast(GroupBaselineLearner, recipe.learner)
        self.policy = load_policy(recipe, total_updates)
        coefficient = self.learner.kl_coefficient
        returns = partial(remax.returns, kl_penalty="full_step", kl_coefficient=coefficient, gamma=1.0)
        self.reference = load_reference(recipe, self.policy)
        self.step = ReinforceStep(self.learner, rank, self.policy, self.reference, returns)

    def update(self, samples: Samples, batch: UpdateBatch, metrics: MetricsAccumulator) -> dict[str, float]:
        """Takes one optimizer step. Returns the update's metrics."""
        assert batch.baseline is not None
        advantages = torch.from_numpy(batch.reward - batch.baseline)
        if batch.scale is not None:
            advantages = advantages / torch.from_numpy(batch.scale)
        return self.step.take(samples, advantages, metrics)
