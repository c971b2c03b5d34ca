"""ReMax (arXiv 2310.10505): one optimizer step on one step's rollouts, from a single pass over them."""

from functools import partial
from typing import Any, cast

import torch

from c2f_ray.algorithms.base import Algorithm, ScoredStep, load_policy, load_reference
from c2f_ray.algorithms.reinforce import ReinforceStep
from c2f_ray.learner.accumulator import MetricsAccumulator
from c2f_ray.learner.batching import Samples, UpdateBatch
from c2f_ray.losses import remax
from c2f_ray.losses.baselines import greedy_baseline
from c2f_ray.recipe import Recipe, ReMaxLearner


class ReMax(Algorithm):
    """The same on every rank but for ``rank``."""

    @staticmethod
    def batch(step: ScoredStep, learner: Any, seed: list[int]) -> UpdateBatch:
        """Returns all sampled trajectories; the baseline is the reward of the same draw's greedy rollout."""
        sampled = ~step.info.greedy
        baseline = greedy_baseline(step.draw, step.reward, step.info.greedy)
        return UpdateBatch(step.info.sample_id[sampled], step.reward[sampled], baseline)

    def __init__(self, recipe: Recipe, rank: int, total_updates: int) -> None:
        self.learner = cast(ReMaxLearner, recipe.learner)
        self.policy = load_policy(recipe, total_updates)
        returns = partial(
            remax.returns,
            kl_penalty=self.learner.kl_penalty,
            kl_coefficient=self.learner.kl_coefficient,
            gamma=self.learner.gamma,
        )
        self.reference = load_reference(recipe, self.policy)
        self.step = ReinforceStep(self.learner, rank, self.policy, self.reference, returns)

    def update(self, samples: Samples, batch: UpdateBatch, metrics: MetricsAccumulator) -> dict[str, float]:
        """Takes one optimizer step. Returns the update's metrics."""
        assert batch.baseline is not None
        reward, baseline = torch.from_numpy(batch.reward), torch.from_numpy(batch.baseline)
        return self.step.take(samples, remax.advantage(reward, baseline, self.learner.reward_clip), metrics)
