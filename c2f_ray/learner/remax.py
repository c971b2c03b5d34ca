"""ReMax's update: one optimizer step on one step's rollouts, from a single pass over them."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from c2f_ray.learner.batching import MicroBatch, Reference, Samples, UpdateBatch, rank_plan
from c2f_ray.learner.finite import on_all_ranks, refuse_norm, refuse_samples
from c2f_ray.learner.tally import Tally, rollout_metrics
from c2f_ray.losses import importance, remax
from c2f_ray.recipe.schema import ReMaxLearner

if TYPE_CHECKING:  # it imports DeepSpeed
    from c2f_ray.learner.engine import TrainedModel


class ReMax:
    """The same on every rank but for ``rank``."""

    def __init__(self, learner: ReMaxLearner, rank: int, policy: "TrainedModel", reference: Reference | None) -> None:
        self.learner = learner
        self.rank = rank
        self.policy = policy
        self.reference = reference

    @property
    def models(self) -> dict[str, "TrainedModel"]:
        return {"policy": self.policy}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the models: nothing here."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass

    def update(self, samples: Samples, batch: UpdateBatch, tally: Tally) -> dict[str, float]:
        """Returns the update's metrics. ``batch`` has the rows of ``samples``."""
        assert batch.baseline is not None  # the driver asks for greedy rollouts
        reward, baseline = torch.from_numpy(batch.reward), torch.from_numpy(batch.baseline)
        advantages = remax.advantage(reward, baseline, self.learner.reward_clip)
        num_tokens = int(samples.response_tokens.sum())
        micro_batches = rank_plan(samples, np.arange(len(samples.sample_id)), self.rank, self.learner)
        bad: list[int] = []
        for i, (rows, num_chunks) in enumerate(micro_batches):
            micro = samples.micro_batch(rows).to(tally.device)
            loss, finite = self._loss(micro, num_chunks, advantages[rows].to(tally.device), num_tokens, tally)
            bad += samples.sample_id[rows[~finite.cpu().numpy()]].tolist()
            last = i == len(micro_batches) - 1
            if last and (bad := on_all_ranks(bad)):
                loss = loss * torch.nan  # then DeepSpeed discards the whole gradient
            with tally.seconds("time/learner_forward_backward_s"):
                self.policy.backward(loss, last=last)
        with tally.seconds("time/learner_step_s"):
            lr, grad_norm = self.policy.step()
        refuse_samples(bad, "the logprobs of the policy or of its reference")
        refuse_norm(grad_norm, "policy", samples.sample_id)
        totals = tally.reduce()
        return {
            "learner/loss": totals["loss"],
            "learner/return_mean": totals["returns"] / num_tokens,
            "learner/lr": lr,
            "learner/grad_norm": grad_norm,
        } | rollout_metrics(totals, samples, has_reference=self.reference is not None)

    def _loss(
        self, micro: MicroBatch, num_chunks: int, advantages: Tensor, num_tokens: int, tally: Tally
    ) -> tuple[Tensor, Tensor]:
        """This micro-batch's part of the update's loss, a scalar, and which of its rows are finite, bool [B].

        The returns' KL term uses the logprobs of the same forward: there is one update per rollout, so the weights
        are the rollout's. The sampler's own logprobs count in the importance weights only.
        """
        learner = self.learner
        with tally.seconds("time/learner_reference_s"), torch.no_grad():
            reference = None
            if self.reference is not None:
                reference = self.reference(*micro.inputs, num_chunks, **micro.packing)[0]
        with tally.seconds("time/learner_forward_backward_s"):
            logprobs, entropy = self.policy.engine(*micro.inputs, num_chunks, **micro.packing)
        at_rollout = logprobs.detach()
        kl = torch.zeros_like(at_rollout) if reference is None else at_rollout - reference
        returns = remax.returns(
            advantages, micro.unflatten(kl), micro.mask, learner.kl_penalty, learner.kl_coefficient, learner.gamma
        )
        weights = importance.weights(at_rollout, micro.sampler_logprobs, learner.importance_clip)
        weighted = returns if learner.importance_clip is None else returns * micro.unflatten(weights)
        loss = remax.loss(weighted, micro.unflatten(logprobs), micro.mask, num_tokens)
        tally.add(loss=loss.detach(), returns=returns)
        tally.rollout(micro, at_rollout, entropy, kl, weights)
        return loss, (returns * micro.unflatten(at_rollout)).isfinite().all(-1)
