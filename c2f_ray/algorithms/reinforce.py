"""One REINFORCE step with a baseline and a KL penalty in the return: what ReMax and group baselines share."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from c2f_ray.algorithms.base import GradientStep
from c2f_ray.learner.accumulator import MetricsAccumulator, rollout_metrics
from c2f_ray.learner.batching import MicroBatch, Reference, Samples
from c2f_ray.losses import importance, remax
from c2f_ray.recipe import ReinforceLearner

if TYPE_CHECKING:  # it imports DeepSpeed
    from c2f_ray.learner.engine import TrainedModel

# Advantages [B], KL to the reference [B, T] and mask [B, T] to the return of each token [B, T].
Returns = Callable[[Tensor, Tensor, Tensor], Tensor]


class ReinforceStep:
    """Takes one optimizer step on a step's rollouts. The same on every rank but for ``rank``."""

    def __init__(
        self,
        learner: ReinforceLearner,
        rank: int,
        policy: "TrainedModel",
        reference: Reference | None,
        returns: Returns,
    ) -> None:
        self.learner = learner
        self.rank = rank
        self.policy = policy
        self.reference = reference
        self.returns = returns

    def take(self, samples: Samples, advantages: Tensor, metrics: MetricsAccumulator) -> dict[str, float]:
        """Takes the step. ``advantages`` [N] are of the rows of ``samples``. Returns the update's metrics."""
        step = GradientStep(samples, np.arange(len(samples.sample_id)), self.rank, self.learner, metrics)
        for micro, num_chunks in step.micro_batches():
            advantage = advantages[micro.rows].to(metrics.device)
            loss, finite = self._loss(micro, num_chunks, advantage, step.num_tokens, metrics)
            with metrics.seconds("time/learner_forward_backward_s"):
                step.backward(self.policy, micro, loss, finite)
        checked = "the logprobs of the policy or of its reference"
        lr, grad_norm = step.step({"policy": self.policy}, checked)["policy"]
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
        with metrics.seconds("time/learner_reference_s"), torch.no_grad():
            reference = None
            if self.reference is not None:
                reference = self.reference(*micro.inputs, num_chunks, **micro.packing)[0]
        with metrics.seconds("time/learner_forward_backward_s"):
            logprobs, entropy = self.policy.engine(*micro.inputs, num_chunks, **micro.packing)
        at_rollout = logprobs.detach()
        kl = torch.zeros_like(at_rollout) if reference is None else at_rollout - reference
        returns = self.returns(advantages, micro.unflatten(kl), micro.mask)
        clip = self.learner.importance_clip
        weights = importance.weights(at_rollout, micro.sampler_logprobs, clip)
        weighted = returns if clip is None else returns * micro.unflatten(weights)
        loss = remax.loss(weighted, micro.unflatten(logprobs), micro.mask, num_tokens)
        metrics.add(loss=loss.detach(), returns=returns)
        metrics.rollout(micro, at_rollout, entropy, kl, weights)
        return loss, (returns * micro.unflatten(at_rollout)).isfinite().all(-1)
