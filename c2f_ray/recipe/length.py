"""Section `length`: the rule that sets the response limit of every step."""

from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import Field, model_validator

from c2f_ray.recipe.base import Count, Positive, Section


class LengthBase(Section):
    """What other modules must know about a rule."""

    needs_guide: ClassVar[bool] = False
    """The rule observes a critic or a baseline."""

    @property
    def first_tokens(self) -> int:
        """Response limit of the first step, in tokens."""
        raise NotImplementedError


class FixedLength(LengthBase):
    """The same limit in every step."""

    rule: Literal["fixed"]
    """Name of the rule."""
    max_tokens: Count
    """Longest response of any step, in tokens."""

    @property
    def first_tokens(self) -> int:
        return self.max_tokens


GrowingLength = TypeVar("GrowingLength", bound="LinearLength | LogisticLength")


def _limits_in_order(length: GrowingLength) -> GrowingLength:
    if length.start_tokens > length.max_tokens:
        raise ValueError(f"start_tokens {length.start_tokens} is more than max_tokens {length.max_tokens}")
    return length


class LinearLength(LengthBase):
    """A limit that grows by the same amount in every step."""

    rule: Literal["linear"]
    """Name of the rule."""
    start_tokens: Count
    """Longest response of the first step, in tokens."""
    max_tokens: Count
    """Longest response of any step, in tokens."""
    over_steps: Count
    """Steps after which the limit reaches `max_tokens`."""

    @model_validator(mode="after")
    def _grows(self) -> "LinearLength":
        return _limits_in_order(self)

    @property
    def first_tokens(self) -> int:
        return self.start_tokens


class LogisticLength(LengthBase):
    """Continuous Maximization (arXiv 2406.08657). Its coefficients and limits are unpublished, so these are ours."""

    rule: Literal["logistic"]
    """Name of the rule."""
    start_tokens: Count
    """Longest response of the first step, in tokens."""
    max_tokens: Count
    """Longest response of any step, in tokens."""
    max_step_tokens: Positive
    """Growth of the limit in one step, in tokens, when the logistic is 1."""
    reward_weight: float = 1.0
    """Weight of the standardised mean reward."""
    critic_weight: float = 0.5
    """Weight of the standardised critic loss; without a critic, of the spread of reward minus baseline."""
    bias: float = 0.0
    """Constant term of the logistic."""
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Weight of the past in the running mean and variance."""
    z_clip: Positive = 3.0
    """Standardised features are clipped to plus or minus this."""

    @model_validator(mode="after")
    def _grows(self) -> "LogisticLength":
        return _limits_in_order(self)

    needs_guide: ClassVar[bool] = True

    @property
    def first_tokens(self) -> int:
        return self.start_tokens


Length = Annotated[FixedLength | LinearLength | LogisticLength, Field(discriminator="rule")]
