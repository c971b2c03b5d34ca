"""The response limit of every step: Continuous Maximization's controller and the two schedules it is compared with.

Invariants: the limit never shrinks and never passes the recipe's maximum; the next state is a pure function of this one
and of the step's two features, so a run resumed from a saved state grows exactly as the uninterrupted one.

Continuous Maximization (arXiv 2406.08657) extends the limit by a logistic regression on the reward score and the
critic's losses. Its coefficients are not published; ours are the recipe's, and so are the running standardisation below
and the feature that stands in for the critic when there is none.
"""

import math
from dataclasses import dataclass

from c2f_ray.recipe import Length, LogisticLength

MIN_VARIANCE = 1e-12  # a feature that has moved less than a millionth has no scale to be measured on yet


@dataclass(frozen=True)
class LengthState:
    """What a checkpoint keeps; all JSON numbers. ``LengthState(**asdict(state))`` is the same state."""

    limit: float  # tokens, with its fraction, so that growth below one token a step adds up
    step: int = 0  # observations so far
    reward_mean: float = 0.0
    reward_variance: float = 0.0
    critic_mean: float = 0.0
    critic_variance: float = 0.0

    @property
    def tokens(self) -> int:
        """Response limit of the coming step."""
        return math.floor(self.limit)


@dataclass(frozen=True)
class LengthInputs:
    mean_reward: float  # of the step's samples, greedy rollouts left out
    critic: float  # the critic's loss; `reward_spread` of a baseline where there is no critic


@dataclass(frozen=True)
class LengthDecision:
    """One step's decision, for its metrics. The schedules leave what only the logistic rule has at None."""

    mean_reward: float
    critic: float
    limit: float  # tokens, of the next step
    z_reward: float | None = None
    z_critic: float | None = None
    p: float | None = None  # the logistic, in (0, 1)


def start(length: Length) -> LengthState:
    """The state before the first step."""
    return LengthState(float(length.max_tokens if length.rule == "fixed" else length.start_tokens))


def standardise(
    value: float, mean: float, variance: float, length: LogisticLength, *, first: bool
) -> tuple[float, float, float]:
    """``(z, mean, variance)``: the value's z-score against the steps before it, and the statistics with it (ours).

    Exponential moving mean and variance (West 1979's incremental form with a constant weight):
    ``mean += (1 - decay) * delta``, ``variance = decay * (variance + (1 - decay) * delta**2)``.
    z is 0 while the steps before have no variance, which is so for the first two, and clipped to +- ``z_clip``.
    """
    if first:
        return 0.0, value, 0.0
    delta = value - mean
    z = 0.0
    if variance > MIN_VARIANCE:
        z = min(max(delta / math.sqrt(variance), -length.z_clip), length.z_clip)
    gain = 1.0 - length.decay
    return z, mean + gain * delta, length.decay * (variance + gain * delta * delta)


def observe(length: Length, state: LengthState, inputs: LengthInputs) -> tuple[LengthState, LengthDecision]:
    """What the finished step says about the next one's limit."""
    if length.rule == "logistic":
        return _observe_logistic(length, state, inputs)
    step = state.step + 1
    limit = state.limit
    if length.rule == "linear":
        steps = min(step, length.over_steps)
        limit = length.start_tokens + (length.max_tokens - length.start_tokens) * steps / length.over_steps
    return LengthState(limit, step), LengthDecision(inputs.mean_reward, inputs.critic, limit)


def _observe_logistic(
    length: LogisticLength, state: LengthState, inputs: LengthInputs
) -> tuple[LengthState, LengthDecision]:
    """``p = sigmoid(w_r z_r - w_c z_c + bias)``, ``limit = min(limit + p * max_step, max)``; after arXiv 2406.08657."""
    first = state.step == 0
    z_reward, *reward = standardise(inputs.mean_reward, state.reward_mean, state.reward_variance, length, first=first)
    z_critic, *critic = standardise(inputs.critic, state.critic_mean, state.critic_variance, length, first=first)
    p = 1.0 / (1.0 + math.exp(-(length.reward_weight * z_reward - length.critic_weight * z_critic + length.bias)))
    limit = min(state.limit + p * length.max_step_tokens, float(length.max_tokens))
    decision = LengthDecision(inputs.mean_reward, inputs.critic, limit, z_reward, z_critic, p)
    return LengthState(limit, state.step + 1, *reward, *critic), decision
