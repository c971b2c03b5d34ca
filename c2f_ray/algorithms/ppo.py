"""PPO (arXiv 1707.06347): a pass over a step's rollouts at rollout weights, then epochs of steps on minibatches.

Invariants: what the first pass finds is the same on every rank, and so are advantages, returns and minibatches; a
minibatch is a choice of samples by seed, update and epoch, however many ranks share it; rollouts of a critic warm-up
step train the critic only and are never seen again.
"""

import math
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, distributed

from c2f_ray.algorithms.base import Algorithm, GradientStep, load_critic, load_policy, load_reference
from c2f_ray.data.trajectory import Float32, Int64
from c2f_ray.learner.accumulator import MetricsAccumulator, rollout_metrics
from c2f_ray.learner.batching import MicroBatch, Samples, UpdateBatch, rank_plan
from c2f_ray.learner.finite import refuse_samples
from c2f_ray.losses import gae, importance, kl
from c2f_ray.losses import policy as losses
from c2f_ray.losses.running import Moments
from c2f_ray.recipe import Recipe

if TYPE_CHECKING:  # it imports DeepSpeed
    from c2f_ray.learner.engine import TrainedModel


@dataclass(frozen=True)
class Experience:
    """What the update learns from, for each response token of all samples, row by row; float32 [R] on the device."""

    logprobs: Tensor  # of the policy at rollout weights
    reference: Tensor  # logprobs; the policy's where there is no reference
    values: Tensor  # at rollout weights
    advantages: Tensor
    returns: Tensor

    def select(self, tokens: Tensor) -> "Experience":
        return Experience(*(getattr(self, name)[tokens] for name in self.__dataclass_fields__))


class PPO(Algorithm):
    """The same on every rank but for ``rank``. Changes from update to update: what the constructor sets last."""

    def __init__(self, recipe: Recipe, rank: int, total_updates: int) -> None:
        learner: Any = recipe.learner
        steps = learner.epochs * learner.minibatches  # of each optimizer in one update
        policy_steps = (total_updates - learner.critic.warmup_steps) * steps
        self.learner = learner
        self.seed = recipe.run.seed
        self.rank = rank
        self.policy = load_policy(recipe, policy_steps, entropy_gradient=learner.entropy_coefficient > 0)
        self.critic = load_critic(recipe, learner.critic.optimizer, total_updates * steps)
        self.reference = load_reference(recipe, self.policy)
        self.updates = 0  # done, those of the critic's warm-up included
        self.kl_coefficient = learner.kl_coefficient
        self.rewards = Moments()

    @property
    def models(self) -> dict[str, "TrainedModel"]:
        """Returns what a checkpoint keeps of models, by the prefix of its files."""
        return {"policy": self.policy, "critic": self.critic}

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps beside the models, all JSON."""
        return {"updates": self.updates, "kl_coefficient": self.kl_coefficient, "rewards": asdict(self.rewards)}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes what ``state`` returned."""
        self.updates = state["updates"]
        if self.learner.kl_target is not None:  # else the recipe's holds, which may have been changed
            self.kl_coefficient = state["kl_coefficient"]
        self.rewards = Moments(**state["rewards"])

    def update(self, samples: Samples, batch: UpdateBatch, metrics: MetricsAccumulator) -> dict[str, float]:
        """Returns the update's metrics. ``batch`` has the rows of ``samples``."""
        learner, num_samples = self.learner, len(samples.sample_id)
        update, self.updates = self.updates, self.updates + 1
        train_policy = update >= learner.critic.warmup_steps
        evaluated = self._evaluate(samples, metrics)
        experience = self._experience(samples, evaluated, self._scores(batch.reward))
        steps: list[dict[str, float]] = []
        far = False  # a minibatch of this update has found the policy beyond kl_stop
        for epoch in range(learner.epochs):
            order = np.random.default_rng([self.seed, update, epoch]).permutation(num_samples)
            for rows in np.array_split(order, min(learner.minibatches, num_samples)):
                steps.append(self._minibatch(samples, rows, experience, train_policy and not far, metrics))
                far = far or steps[-1].get("approx_kl", 0.0) > (learner.kl_stop or math.inf)
        totals = metrics.reduce()
        found = self._metrics(totals, samples, experience, train_policy, steps)
        found |= rollout_metrics(totals, samples, has_reference=self.reference is not None)
        if train_policy and learner.kl_target is not None:
            self.kl_coefficient = kl.next_coefficient(self.kl_coefficient, found["kl/sequence"], learner.kl_target)
        return found

    def _scores(self, rewards: Float32) -> Tensor:
        """Float32 [N]: normalised if the recipe says so, then clipped."""
        if self.learner.normalise_reward:
            self.rewards = self.rewards.add(rewards)
            rewards = self.rewards.standardise(rewards)
        return torch.from_numpy(rewards).clamp(-self.learner.reward_clip, self.learner.reward_clip)

    def _evaluate(self, samples: Samples, metrics: MetricsAccumulator) -> Tensor:
        """[3, R], the same on every rank: the policy's logprobs, the reference's, and the critic's values.

        Each rank fills in its own samples, and the rest is zero: their sum over the ranks is exact.
        """
        found = torch.zeros(3, int(samples.response_tokens.sum()), device=metrics.device)
        with torch.no_grad(), metrics.seconds("time/learner_evaluate_s"):
            for rows, num_chunks in rank_plan(samples, np.arange(len(samples.sample_id)), self.rank, self.learner):
                micro = samples.micro_batch(rows).to(metrics.device)
                logprobs, entropy = self.policy.engine(*micro.inputs, num_chunks, **micro.packing)
                reference = logprobs
                if self.reference is not None:
                    reference = self.reference(*micro.inputs, num_chunks, **micro.packing)[0]
                values = self.critic.engine(micro.input_ids, micro.predicts, **micro.packing)
                found[:, samples.tokens_of(rows).to(metrics.device)] = torch.stack([logprobs, reference, values])
                weights = importance.weights(logprobs, micro.sampler_logprobs, self.learner.importance_clip)
                metrics.rollout(micro, logprobs, entropy, logprobs - reference, weights)
            distributed.all_reduce(found)
        return found

    def _experience(self, samples: Samples, evaluated: Tensor, scores: Tensor) -> Experience:
        learner = self.learner
        logprobs, reference, values = evaluated
        lengths = torch.from_numpy(samples.response_tokens).to(values.device)
        mask = torch.arange(int(lengths.max()), device=values.device) < lengths[:, None]

        def pad(tokens: Tensor) -> Tensor:
            return tokens.new_zeros(mask.shape).masked_scatter(mask, tokens)

        penalty = torch.zeros_like(logprobs)
        if learner.kl_in == "reward":
            estimate = kl.estimate(logprobs, reference, learner.kl_estimator, learner.log_ratio_clip)
            penalty = self.kl_coefficient * estimate
        rewards = losses.token_rewards(scores.to(values.device), pad(penalty), mask)
        by_sample = gae.advantages(rewards, pad(values), mask, learner.gamma, learner.gae_lambda)
        finite = (by_sample + pad(logprobs + reference)).isfinite().all(-1).cpu().numpy()
        what = "the logprobs of the policy or of its reference, the critic's values, or the advantages made of them"
        refuse_samples(samples.sample_id[~finite].tolist(), what)  # the same on every rank
        advantages = by_sample[mask]
        return Experience(
            logprobs=logprobs,
            reference=reference,
            values=values,
            advantages=gae.whiten(advantages, learner.whiten_advantages),
            returns=advantages + values,
        )

    def _minibatch(
        self, samples: Samples, rows: Int64, experience: Experience, train_policy: bool, metrics: MetricsAccumulator
    ) -> dict[str, float]:
        """One step of each optimizer that learns. Returns what ``_metrics`` needs of it.

        A model whose gradient is not finite takes no step; then the error is raised, and ends the update.
        """
        step = GradientStep(samples, rows, self.rank, self.learner, metrics)
        approx_kl = torch.zeros((), device=metrics.device)
        for micro, num_chunks in step.micro_batches():
            tokens = experience.select(samples.tokens_of(micro.rows).to(metrics.device))
            with metrics.seconds("time/critic_forward_backward_s"):
                loss = self._value_loss(micro, tokens, metrics)
                step.backward(self.critic, micro, loss.sum() / step.num_tokens, _finite(micro, loss))
            if train_policy:
                with metrics.seconds("time/learner_forward_backward_s"):
                    loss, kl_sum = self._policy_loss(micro, num_chunks, tokens, metrics)
                    approx_kl += kl_sum
                    step.backward(self.policy, micro, loss.sum() / step.num_tokens, _finite(micro, loss))
        models = {"critic": self.critic, **({"policy": self.policy} if train_policy else {})}
        steps = step.step(models, "the losses of the policy or of the critic")
        taken = dict(zip(("critic/lr", "critic/grad_norm"), steps["critic"], strict=True))
        if train_policy:
            taken |= dict(zip(("learner/lr", "learner/grad_norm"), steps["policy"], strict=True))
            if self.learner.kl_stop is not None:
                distributed.all_reduce(approx_kl)
            taken |= {"tokens": step.num_tokens, "approx_kl": float(approx_kl) / step.num_tokens}
        return taken

    def _value_loss(self, micro: MicroBatch, tokens: Experience, metrics: MetricsAccumulator) -> Tensor:
        """[R], of each token."""
        values = self.critic.engine(micro.input_ids, micro.predicts, **micro.packing)
        loss, clipped = losses.value_loss(values, tokens.values, tokens.returns, self.learner.value_clip)
        metrics.add(value_loss=loss.detach(), value_clipped=clipped)
        return loss

    def _policy_loss(
        self, micro: MicroBatch, num_chunks: int, tokens: Experience, metrics: MetricsAccumulator
    ) -> tuple[Tensor, Tensor]:
        """[R], of each token, with the entropy bonus and the KL where the recipe has them in the loss; and the sum of
        the tokens' distances from the policy at rollout, in nats.
        """
        learner = self.learner
        logprobs, entropy = self.policy.engine(*micro.inputs, num_chunks, **micro.packing)
        clips = learner.clip_ratio, learner.dual_clip, learner.log_ratio_clip
        found = losses.policy_loss(logprobs, tokens.logprobs, tokens.advantages, *clips)
        metrics.add(
            policy_loss=found.loss.detach(),
            clipped=found.clipped,
            dual_clipped=found.dual_clipped,
            approx_kl=found.approx_kl,
        )
        loss = found.loss
        if learner.importance_clip is not None:
            loss = loss * importance.weights(tokens.logprobs, micro.sampler_logprobs, learner.importance_clip)
        if learner.entropy_coefficient > 0:
            loss = loss - learner.entropy_coefficient * entropy
        if learner.kl_in == "loss":
            estimate = kl.estimate(logprobs, tokens.reference, learner.kl_estimator, learner.log_ratio_clip)
            loss = loss + self.kl_coefficient * estimate
        return loss, found.approx_kl.sum()

    def _metrics(
        self,
        totals: dict[str, float],
        samples: Samples,
        experience: Experience,
        train_policy: bool,
        steps: list[dict[str, float]],
    ) -> dict[str, float]:
        """Losses and shares are means over the tokens of all epochs, norms over the optimizer's steps.

        The policy's loss is the clipped surrogate, without entropy bonus and KL.
        """
        tokens = float(samples.response_tokens.sum()) * self.learner.epochs
        metrics = {
            "critic/loss": totals["value_loss"] / tokens,
            "critic/clip_fraction": totals["value_clipped"] / tokens,
            "critic/explained_variance": losses.explained_variance(experience.values, experience.returns),
            "critic/value_mean": float(experience.values.mean()),
            "critic/lr": steps[-1]["critic/lr"],
            "critic/grad_norm": fmean(step["critic/grad_norm"] for step in steps),
            "learner/return_mean": float(experience.returns.mean()),
            "kl/coefficient": self.kl_coefficient,
        }
        if train_policy:
            taken = [step for step in steps if "tokens" in step]  # before kl_stop
            tokens = sum(step["tokens"] for step in taken)
            metrics |= {
                "learner/loss": totals["policy_loss"] / tokens,
                "learner/clip_fraction": totals["clipped"] / tokens,
                "learner/dual_clip_fraction": totals["dual_clipped"] / tokens,
                "learner/approx_kl": totals["approx_kl"] / tokens,
                "learner/steps": len(taken),
                "learner/lr": taken[-1]["learner/lr"],
                "learner/grad_norm": fmean(step["learner/grad_norm"] for step in taken),
            }
        return metrics


def _finite(micro: MicroBatch, loss: Tensor) -> Tensor:
    """Returns which rows' losses are finite, bool [B], of the tokens' losses [R]."""
    return micro.unflatten(loss.detach()).isfinite().all(-1)
