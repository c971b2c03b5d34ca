"""Section `learner`: one class for each algorithm, with its settings."""

from collections.abc import Callable
from fractions import Fraction
from math import ceil
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from c2f_ray.recipe.base import Count, Positive, Section, Share
from c2f_ray.recipe.learner import LearnerBase, Optimizer, Passes
from c2f_ray.recipe.location import Location
from c2f_ray.recipe.reward import Reward, UltraRMReward


class ReinforceLearner(LearnerBase):
    """One policy gradient step from a single pass over the rollouts, with a KL penalty in the return."""

    kl_coefficient: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the KL penalty. 0 drops the reference model."""
    importance_clip: Annotated[float, Field(ge=1)] | None = None
    """Bound of each token's ratio of policy to sampler probability. null: no correction."""

    @property
    def has_reference(self) -> bool:
        """Returns True where a KL penalty needs the policy that the run started from."""
        return self.kl_coefficient > 0

    def passes(self, samples: int) -> list[Passes]:
        """Returns what an update does with the policy: one step from a single pass."""
        return [Passes("policy", int(self.has_reference), 1, 1)]


class ReMaxLearner(ReinforceLearner):
    """ReMax (arXiv 2310.10505): the reward of a greedy rollout is the baseline of its prompt's samples; no critic."""

    algorithm: Literal["remax"]
    """Name of the algorithm."""
    kl_penalty: Literal["full_step", "one_step"] = "full_step"
    """KL penalty of all following tokens, as the model card has it, or of one token, as ReMax's 2023 code has it."""
    reward_clip: Positive = 1.0
    """Bound of the reward minus the greedy rollout's reward."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount per token. Only `one_step` discounts."""

    @model_validator(mode="after")
    def _gamma_is_used(self) -> "ReMaxLearner":
        if self.kl_penalty == "full_step" and self.gamma != 1:
            raise ValueError(f"gamma {self.gamma} has no effect with kl_penalty full_step; leave it out")
        return self

    needs_greedy: ClassVar[bool] = True
    baseline_metric: ClassVar[str | None] = "reward/greedy_mean"


class GroupBaselineLearner(ReinforceLearner):
    """Policy gradients whose baseline is the reward of the same draw's other samples: no critic, no greedy rollout."""

    algorithm: Literal["group_baseline"]
    """Name of the algorithm."""
    baseline: Literal["leave_one_out", "mean", "mean_and_deviation"] = "leave_one_out"
    """Mean of the other samples (RLOO, arXiv 2402.14740, section 3.3), mean of all (GRPO, arXiv 2402.03300, equation
    3), or that mean with the difference divided by the standard deviation (the same)."""

    min_samples_per_prompt: ClassVar[int] = 2
    baseline_metric: ClassVar[str | None] = "reward/baseline_mean"


class Critic(Section):
    """A value head on a transformer. The head is the reward model's where there is one, and zero otherwise."""

    model: Location = "policy"
    """`policy`, `reward`, or a folder of a model with the policy's tokenizer."""
    optimizer: Optimizer
    """Optimizer of the critic."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """First steps of the run, which train only the critic."""


class PPOLearner(LearnerBase):
    """PPO (arXiv 1707.06347) with a critic on the same ranks; no greedy rollouts."""

    algorithm: Literal["ppo"]
    """Name of the algorithm."""
    critic: Critic
    """The critic."""
    epochs: Count = 1
    """Passes over the rollouts of a step."""
    minibatches: Count = 4
    """Optimizer steps in one pass. They divide the samples of a step evenly."""
    clip_ratio: Positive = 0.2
    """Distance from 1 at which the probability ratio is clipped."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound of the ratio of tokens with a negative advantage (arXiv 1912.09729), such as 3. null: none."""
    log_ratio_clip: Positive = 20.0
    """Log ratios to the sampler and to the reference are clipped to plus or minus this."""
    value_clip: Positive | None = 0.2
    """Distance from the old value beyond which a value no longer learns. null: none."""
    entropy_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy bonus."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount per token."""
    gae_lambda: Share = 0.95
    """Lambda of generalized advantage estimation (arXiv 1506.02438)."""
    whiten_advantages: Literal["none", "unbiased", "biased"] = "unbiased"
    """Standardise the advantages of all response tokens of a step, by the named variance."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL divergence from the reference."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL penalty goes: into the reward of every token, or into the loss."""
    kl_coefficient: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the KL penalty. 0 drops the reference model."""
    kl_target: Positive | None = None
    """KL in nats per response that the coefficient is adapted to. null keeps the coefficient."""
    normalise_reward: bool = False
    """Standardise rewards by the mean and standard deviation of all rewards so far, before they are clipped."""
    kl_stop: Positive | None = None
    """KL from the sampler in nats per token; a minibatch beyond it is the last of the step. null: none."""
    reward_clip: Positive = 5.0
    """Bound of the reward, before the KL penalty is added."""
    importance_clip: Annotated[float, Field(ge=1)] | None = None
    """Bound of each token's ratio of policy to sampler probability. null: no correction."""

    @model_validator(mode="after")
    def _kl_is_used(self) -> "PPOLearner":
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_in loss with kl_estimator k1 has no effect: its expected gradient is zero; use k2 or k3"
            )
        if self.kl_target is not None and self.kl_coefficient == 0:
            raise ValueError("kl_target has no effect on a kl_coefficient of 0; raise it above, or leave kl_target out")
        return self

    has_critic: ClassVar[bool] = True

    @property
    def has_reference(self) -> bool:
        """Returns True where a KL penalty needs the policy that the run started from."""
        return self.kl_coefficient > 0

    @property
    def names_a_critic(self) -> bool:
        """Returns True where the critic starts from a model that no other section names."""
        return self.critic.model not in ("policy", "reward")

    def critic_model(self, policy: str, reward: Reward) -> str | None:
        """Returns the folder or hub name that the critic starts from."""
        if self.critic.model == "reward":
            assert isinstance(reward, UltraRMReward)  # the recipe is refused otherwise
            return reward.model
        return policy if self.critic.model == "policy" else self.critic.model

    def with_models(self, rename: Callable[[str], str]) -> Self:
        """Returns the same section with the critic's model renamed."""
        if not self.names_a_critic:
            return self
        return self.model_copy(update={"critic": self.critic.model_copy(update={"model": rename(self.critic.model)})})

    def most_ranks(self, samples: int) -> int:
        """Returns the samples of a minibatch: each rank needs one."""
        return samples // self.minibatches

    def passes(self, samples: int) -> list[Passes]:
        """Returns what an update does: a first pass at rollout weights, then epochs of minibatches."""
        steps = self.epochs * self.minibatches
        return [
            Passes("policy", 1 + self.has_reference, self.epochs, steps),
            Passes("critic", 1, self.epochs, steps),
        ]


class RejectionSamplingLearner(LearnerBase):
    """Iterative rejection sampling (Merlinite-7B-pt).

    A step is a round: keep the best of each prompt's samples, fine-tune on them, and sample `evaluate.prompts` to
    measure the gain. The best round becomes the coarse actor.
    """

    algorithm: Literal["rejection_sampling"]
    """Name of the algorithm."""
    restart_from: Literal["start", "last_round"] = "last_round"
    """Weights that each round fine-tunes: the first ones, or those of the last round. The card leaves it open."""
    epochs: Count = 1
    """Passes over the responses that a round keeps."""
    responses_per_update: Count = 128
    """Responses in one optimizer step."""
    min_margin: Annotated[float, Field(ge=0)] | None = None
    """Least reward of a kept response above the mean of its prompt's samples. null: none."""
    top_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the prompts' best responses to keep, by reward."""
    patience: Count = 1
    """Rounds without a better held-out reward after which the run ends."""

    min_samples_per_prompt: ClassVar[int] = 2
    can_pipeline: ClassVar[bool] = False
    guides_length: ClassVar[bool] = False
    needs_heldout: ClassVar[bool] = True

    @property
    def keeps_start(self) -> bool:
        """Returns True where each round begins with the weights of the start."""
        return self.restart_from == "start"

    def learned_samples(self, prompts: int, samples_per_prompt: int) -> int:
        """Returns how many responses a round keeps, at the most: the best of each prompt."""
        return ceil(Fraction(str(self.top_fraction)) * prompts)

    def passes(self, samples: int) -> list[Passes]:
        """Returns what a round does with the policy."""
        return [Passes("policy", 0, self.epochs, self.epochs * ceil(samples / self.responses_per_update))]


Learner = Annotated[
    ReMaxLearner | PPOLearner | GroupBaselineLearner | RejectionSamplingLearner, Field(discriminator="algorithm")
]
