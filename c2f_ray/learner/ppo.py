"""PPO's update: one pass over a step's rollouts at rollout weights, then epochs of optimizer steps on minibatches.

Invariants: what the first pass finds is the same on every rank, and so are advantages, returns and minibatches; a
minibatch is a choice of samples by seed, update and epoch, however many ranks share it; rollouts of a critic warm-up
step train the critic only and are never seen again.
"""

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, distributed

from c2f_ray.algorithms import gae, kl, ppo
from c2f_ray.algorithms.logprobs import ResponseLogprobs
from c2f_ray.algorithms.running import Moments
from c2f_ray.data.trajectory import Float32, Int64
from c2f_ray.learner.batching import MicroBatch, Samples, UpdateBatch, rank_plan
from c2f_ray.learner.finite import refuse_norm, refuse_samples
from c2f_ray.learner.tally import Tally, rollout_metrics
from c2f_ray.recipe.schema import PPOLearner

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


class PPO:
    """The same on every rank but for ``rank``. Changes from update to update: what the constructor sets last."""

    def __init__(
        self,
        learner: PPOLearner,
        seed: int,
        rank: int,
        policy: "TrainedModel",
        reference: ResponseLogprobs | None,
        critic: "TrainedModel",
    ) -> None:
        self.learner = learner
        self.seed = seed
        self.rank = rank
        self.policy = policy
        self.reference = reference
        self.critic = critic
        self.updates = 0  # done, those of the critic's warm-up included
        self.kl_coefficient = learner.kl_coefficient
        self.rewards = Moments()

    def update(self, samples: Samples, batch: UpdateBatch, tally: Tally) -> dict[str, float]:
        """Returns the update's metrics. ``batch`` has the rows of ``samples``."""
        learner, num_samples = self.learner, len(samples.sample_id)
        train_policy = self.updates >= learner.critic.warmup_steps
        evaluated = self._evaluate(samples, tally)
        experience = self._experience(samples, evaluated, self._scores(batch.reward))
        steps: list[dict[str, float]] = []
        for epoch in range(learner.epochs):
            order = np.random.default_rng([self.seed, self.updates, epoch]).permutation(num_samples)
            for rows in np.array_split(order, min(learner.minibatches, num_samples)):
                steps.append(self._minibatch(samples, rows, experience, train_policy, tally))
        totals = tally.reduce()
        metrics = self._metrics(totals, samples, experience, train_policy, steps)
        metrics |= rollout_metrics(totals, samples, has_reference=self.reference is not None)
        if train_policy and learner.kl_target is not None:
            self.kl_coefficient = kl.next_coefficient(self.kl_coefficient, metrics["kl/sequence"], learner.kl_target)
        self.updates += 1
        return metrics

    def _scores(self, rewards: Float32) -> Tensor:
        """Float32 [N]: normalised if the recipe says so, then clipped."""
        if self.learner.normalise_reward:
            self.rewards = self.rewards.add(rewards)
            rewards = self.rewards.standardise(rewards)
        return torch.from_numpy(rewards).clamp(-self.learner.reward_clip, self.learner.reward_clip)

    def _evaluate(self, samples: Samples, tally: Tally) -> Tensor:
        """[3, R], the same on every rank: the policy's logprobs, the reference's, and the critic's values.

        Each rank fills in its own samples, and the rest is zero: their sum over the ranks is exact.
        """
        found = torch.zeros(3, int(samples.response_tokens.sum()), device=tally.device)
        with torch.no_grad(), tally.seconds("time/learner_evaluate_s"):
            for rows, num_chunks in rank_plan(samples, np.arange(len(samples.sample_id)), self.rank, self.learner):
                micro = samples.micro_batch(rows).to(tally.device)
                logprobs, entropy = self.policy.engine(*micro.inputs, num_chunks)
                reference = logprobs if self.reference is None else self.reference(*micro.inputs, num_chunks)[0]
                values = self.critic.engine(micro.input_ids, micro.predicts)
                found[:, samples.tokens_of(rows).to(tally.device)] = torch.stack([logprobs, reference, values])
                tally.rollout(micro, logprobs, entropy, logprobs - reference)
            distributed.all_reduce(found)
        return found

    def _experience(self, samples: Samples, evaluated: Tensor, scores: Tensor) -> Experience:
        learner = self.learner
        logprobs, reference, values = evaluated
        lengths = torch.from_numpy(samples.response_tokens).to(values.device)
        mask = torch.arange(int(lengths.max()), device=values.device) < lengths[:, None]

        def pad(tokens: Tensor) -> Tensor:
            return tokens.new_zeros(mask.shape).masked_scatter(mask, tokens)

        finite = pad(evaluated.sum(0)).isfinite().all(-1).cpu().numpy()
        refuse_samples(
            samples.sample_id[~finite].tolist() if self.rank == 0 else [],
            "the logprobs of the policy or of its reference, or the critic's values,",
        )
        penalty = torch.zeros_like(logprobs)
        if learner.kl_in == "reward":
            penalty = self.kl_coefficient * kl.estimate(logprobs, reference, learner.kl_estimator)
        rewards = ppo.token_rewards(scores.to(values.device), pad(penalty), mask)
        advantages = gae.advantages(rewards, pad(values), mask, learner.gamma, learner.gae_lambda)[mask]
        return Experience(
            logprobs=logprobs,
            reference=reference,
            values=values,
            advantages=gae.whiten(advantages, learner.whiten_advantages),
            returns=advantages + values,
        )

    def _minibatch(
        self, samples: Samples, rows: Int64, experience: Experience, train_policy: bool, tally: Tally
    ) -> dict[str, float]:
        """One step of each optimizer that learns. Returns their learning rates and gradient norms."""
        num_tokens = int(samples.response_tokens[rows].sum())
        micro_batches = rank_plan(samples, rows, self.rank, self.learner)
        bad: list[int] = []
        for i, (part, num_chunks) in enumerate(micro_batches):
            micro = samples.micro_batch(part).to(tally.device)
            tokens = experience.select(samples.tokens_of(part).to(tally.device))
            last = i == len(micro_batches) - 1
            with tally.seconds("time/critic_forward_backward_s"):
                loss = self._value_loss(micro, tokens, tally)
                self.critic.backward(loss.sum() / num_tokens, last=last)
            if train_policy:
                with tally.seconds("time/learner_forward_backward_s"):
                    policy_loss = self._policy_loss(micro, num_chunks, tokens, tally)
                    self.policy.backward(policy_loss.sum() / num_tokens, last=last)
                loss = loss + policy_loss
            finite = micro.unflatten(loss.detach()).isfinite().all(-1)
            bad += samples.sample_id[part[~finite.cpu().numpy()]].tolist()
        refuse_samples(bad, "the losses of the policy or of the critic")
        with tally.seconds("time/learner_step_s"):
            critic_lr, critic_norm = self.critic.step()
            refuse_norm(critic_norm, "critic", samples.sample_id[rows])
            taken = {"critic/lr": critic_lr, "critic/grad_norm": critic_norm}
            if train_policy:
                lr, norm = self.policy.step()
                refuse_norm(norm, "policy", samples.sample_id[rows])
                taken |= {"learner/lr": lr, "learner/grad_norm": norm}
        return taken

    def _value_loss(self, micro: MicroBatch, tokens: Experience, tally: Tally) -> Tensor:
        """[R], of each token."""
        values = self.critic.engine(micro.input_ids, micro.predicts)
        loss, clipped = ppo.value_loss(values, tokens.values, tokens.returns, self.learner.value_clip)
        tally.add(value_loss=loss.detach(), value_clipped=clipped)
        return loss

    def _policy_loss(self, micro: MicroBatch, num_chunks: int, tokens: Experience, tally: Tally) -> Tensor:
        """[R], of each token, with the entropy bonus and the KL where the recipe has them in the loss."""
        learner = self.learner
        logprobs, entropy = self.policy.engine(*micro.inputs, num_chunks)
        clips = learner.clip_ratio, learner.dual_clip, learner.log_ratio_clip
        found = ppo.policy_loss(logprobs, tokens.logprobs, tokens.advantages, *clips)
        tally.add(
            policy_loss=found.loss.detach(),
            clipped=found.clipped,
            dual_clipped=found.dual_clipped,
            approx_kl=found.approx_kl,
        )
        loss = found.loss
        if learner.entropy_coefficient > 0:
            loss = loss - learner.entropy_coefficient * entropy
        if learner.kl_in == "loss":
            loss = loss + self.kl_coefficient * kl.estimate(logprobs, tokens.reference, learner.kl_estimator)
        return loss

    def _metrics(
        self,
        totals: dict[str, float],
        samples: Samples,
        experience: Experience,
        train_policy: bool,
        steps: list[dict[str, float]],
    ) -> dict[str, float]:
        """Losses and shares are means over the tokens of all epochs, norms over the optimizer's steps."""
        tokens = float(samples.response_tokens.sum()) * self.learner.epochs
        metrics = {
            "critic/loss": totals["value_loss"] / tokens,
            "critic/clip_fraction": totals["value_clipped"] / tokens,
            "critic/explained_variance": ppo.explained_variance(experience.values, experience.returns),
            "critic/value_mean": float(experience.values.mean()),
            "critic/lr": steps[-1]["critic/lr"],
            "critic/grad_norm": fmean(step["critic/grad_norm"] for step in steps),
            "learner/return_mean": float(experience.returns.mean()),
            "kl/coefficient": self.kl_coefficient,
        }
        if train_policy:
            metrics |= {
                "learner/loss": totals["policy_loss"] / tokens,
                "learner/clip_fraction": totals["clipped"] / tokens,
                "learner/dual_clip_fraction": totals["dual_clipped"] / tokens,
                "learner/approx_kl": totals["approx_kl"] / tokens,
                "learner/lr": steps[-1]["learner/lr"],
                "learner/grad_norm": fmean(step["learner/grad_norm"] for step in steps),
            }
        return metrics
