"""ReMax (arXiv 2310.10505): one optimizer step on one step's rollouts, from a single pass over them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from c2f_ray.algorithms.base import Algorithm, GradientStep, ScoredStep, load_policy, load_reference
from c2f_ray.learner.accumulator import MetricsAccumulator, rollout_metrics
from c2f_ray.learner.batching import MicroBatch, Samples, UpdateBatch
from c2f_ray.losses import importance, remax
from c2f_ray.losses.baselines import greedy_baseline
from c2f_ray.recipe import Recipe


class ReMax(Algorithm):
    """The same on every rank but for ``rank``."""

    @staticmethod
    def batch(step: ScoredStep, learner: Any, seed: list[int]) -> UpdateBatch:
        """Returns all sampled trajectories; the baseline is the reward of the same draw's greedy rollout."""
        sampled = ~step.info.greedy
        baseline = greedy_baseline(step.draw, step.reward, step.info.greedy)
        return UpdateBatch(step.info.sample_id[sampled], step.reward[sampled], baseline)

    def __init__(self, recipe: Recipe, rank: int, total_updates: int) -> None:
        self.learner: Any = recipe.learner
        self.rank = rank
        self.policy = load_policy(recipe, total_updates)
        self.reference = load_reference(recipe, self.policy)

    def update(self, samples: Samples, batch: UpdateBatch, metrics: MetricsAccumulator) -> dict[str, float]:
        """Takes one optimizer step. Returns the update's metrics."""
        assert batch.baseline is not None
        reward, baseline = torch.from_numpy(batch.reward), torch.from_numpy(batch.baseline)
        advantages = remax.advantage(reward, baseline, self.learner.reward_clip)
        step = GradientStep(samples, np.arange(len(samples.sample_id)), self.rank, self.learner, metrics)
        for micro, num_chunks in step.micro_batches():
            advantage = advantages[micro.rows].to(metrics.device)
            loss, finite = self._loss(micro, num_chunks, advantage, step.num_tokens, metrics)
            with metrics.seconds("time/learner_forward_backward_s"):
                step.backward(self.policy, micro, loss, finite)
        lr, grad_norm = step.step(self.models, "the logprobs of the policy or of its reference")["policy"]
        totals = metrics.reduce()
        return {
            "learner/loss": totals["loss"],
            "learner/return_mean": totals["returns"] / step.num_tokens,
            "learner/lr": lr,
            "learner/grad_norm": grad_norm,
        } | rollout_metrics(totals, samples, has_reference=self.reference is not None)

    def _loss(
        self, micro: MicroBatch, num_chunks: int, advantages: Tensor, num_tokens: int, metrics: MetricsAccumulator
    ) -> tuple[Tensor, Tensor]:
        """Returns this micro-batch's part of the update's loss, a scalar, and which of its rows are finite, bool [B].

        The returns' KL term uses the logprobs of the same forward: there is one update per rollout, so the weights
        are the rollout's. The sampler's own logprobs count in the importance weights only.
        """
        learner = self.learner
        with metrics.seconds("time/learner_reference_s"), torch.no_grad():
            reference = None
            if self.reference is not None:
                reference = self.reference(*micro.inputs, num_chunks, **micro.packing)[0]
        with metrics.seconds("time/learner_forward_backward_s"):
            logprobs, entropy = self.policy.engine(*micro.inputs, num_chunks, **micro.packing)
        at_rollout = logprobs.detach()
        kl = torch.zeros_like(at_rollout) if reference is None else at_rollout - reference
        returns = remax.returns(
            advantages, micro.unflatten(kl), micro.mask, learner.kl_penalty, learner.kl_coefficient, learner.gamma
        )
        weights = importance.weights(at_rollout, micro.sampler_logprobs, learner.importance_clip)
        weighted = returns if learner.importance_clip is None else returns * micro.unflatten(weights)
        loss = remax.loss(weighted, micro.unflatten(logprobs), micro.mask, num_tokens)
        metrics.add(loss=loss.detach(), returns=returns)
        metrics.rollout(micro, at_rollout, entropy, kl, weights)
        return loss, (returns * micro.unflatten(at_rollout)).isfinite().all(-1)
