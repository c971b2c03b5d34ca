"""Section `reward`: what scores a response."""

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field

from c2f_ray.recipe.base import Count, Dtype, FunctionPath, Positive, Section
from c2f_ray.recipe.location import Location


class RewardBase(Section):
    """Settings of every reward. What other modules must know about a kind are the facts at the end."""

    workers: Count = 1
    """Number of reward workers."""
    timeout_s: Positive = 1800
    """Seconds without any score after which a worker that owes some is replaced."""
    attempts: Count = 3
    """Attempts to score one sample, each by another worker if there is one."""
    on_failure: Literal["stop", "drop"] = "stop"
    """When a sample gets no score: stop the run, or drop the sample. It is saved in either case."""
    truncation_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Subtracted from the reward of a response that the length limit cut."""

    model_signs: ClassVar[dict[str, float]] = {}
    """By field that names a model: the sign of the model's score. Empty without a model."""
    generates: ClassVar[bool] = False
    """A vLLM engine reads probabilities, and always generates one token more."""
    is_sum: ClassVar[bool] = False
    """It has parts, each with workers of its own."""

    @property
    def gpus(self) -> int:
        """Returns the GPUs of one worker."""
        return 0

    def with_models(self, rename: Callable[[str], str]) -> Self:
        """Returns the same reward with its models renamed."""
        return self.model_copy(update={field: rename(getattr(self, field)) for field in self.model_signs})

    def named_parts(self) -> "dict[str, WeightedReward]":
        """Returns the rewards by name; one that stands alone is named by its kind."""
        return {self.kind: WeightedReward(weight=1.0, reward=self)}  # pyrefly: ignore

    def part_key(self, name: str) -> str:
        """Returns the dotted key of a part."""
        return "reward"


class ModelReward(RewardBase):
    """Settings of rewards that a language model gives."""

    threads: Count | None = None
    """Threads of one worker on the CPU. null: the cores of the node, divided among the workers."""
    gpus_per_worker: Annotated[int, Field(ge=0)] = 1
    """GPUs of one worker. 0 runs it on the CPU."""
    dtype: Dtype = "float16"
    """Type of the reward model's weights."""
    tokens_per_batch: Count = 16384
    """Tokens of one batch, padding included."""
    max_wait_s: Annotated[float, Field(ge=0)] = 0.05
    """Seconds to wait for a batch to fill up, shorter than `timeout_s`. Deterministic runs do not wait."""
    max_tokens: Count = 4096
    """Longest conversation, in tokens. Longer ones lose their first tokens."""
    append_eos: Literal["finished", "always", "never"] = "finished"
    """Which responses get an end-of-sequence token."""

    @property
    def gpus(self) -> int:
        """Returns the GPUs of one worker."""
        return self.gpus_per_worker


class UltraRMReward(ModelReward):
    """The scalar of a reward model of UltraRM's architecture (arXiv 2310.01377)."""

    kind: Literal["ultrarm"]
    """Name of the kind of reward."""
    model: Location
    """Folder of the reward model, or its name on the hub."""
    separator: str = "\n"
    """Text between the turns. The model card's code has two newlines, its examples and ReMax's code one."""

    model_signs: ClassVar[dict[str, float]] = {"model": 1.0}


class LogRatioReward(ModelReward):
    """Log probability of the response under one model minus that under another (RewardBench, arXiv 2403.13787).

    Each model has `workers` workers of `gpus_per_worker` GPUs (tensor parallelism).
    """

    kind: Literal["log_ratio"]
    """Name of the kind of reward."""
    policy_model: Location
    """Model whose log probability counts positively: a folder, or a name on the hub."""
    reference_model: Location
    """Model whose log probability is subtracted: a folder, or a name on the hub."""
    aggregate: Literal["sum", "mean"] = "sum"
    """Sum over the tokens of a response (RewardBench), or mean per token (ours)."""
    chat_template: Location = "model"
    """`model`: the policy model's own; `plain`: the one shipped for base models; else the path of a .jinja file."""
    memory: Positive = 0.9
    """Share of a GPU's memory for the engine; on the CPU, GiB of KV cache."""

    model_signs: ClassVar[dict[str, float]] = {"policy_model": 1.0, "reference_model": -1.0}
    generates: ClassVar[bool] = True


class FunctionReward(RewardBase):
    """A Python function of the user's."""

    kind: Literal["function"]
    """Name of the kind of reward."""
    function: FunctionPath
    """The function, as module:name. It takes a list of samples and returns a list of numbers."""
    timeout_s: Positive = 600
    """Seconds without any score after which a worker that owes some is replaced."""


OneReward = Annotated[UltraRMReward | LogRatioReward | FunctionReward, Field(discriminator="kind")]


class WeightedReward(Section):
    """One term of a sum of rewards."""

    weight: float
    """Factor of this reward in the sum."""
    reward: OneReward
    """The reward, with the same fields as `reward` itself."""


class SumReward(Section):
    """A weighted sum of rewards, each of which is also logged by its name."""

    kind: Literal["sum"]
    """Name of the kind of reward."""
    parts: Annotated[dict[Annotated[str, Field(pattern=r"^[a-z]\w*$")], WeightedReward], Field(min_length=1)]
    """The terms, by names of your choice."""

    is_sum: ClassVar[bool] = True
    generates: ClassVar[bool] = False

    def with_models(self, rename: Callable[[str], str]) -> Self:
        """Returns the same sum with the models of its parts renamed."""
        parts = {
            name: part.model_copy(update={"reward": part.reward.with_models(rename)})
            for name, part in self.parts.items()
        }
        return self.model_copy(update={"parts": parts})

    def named_parts(self) -> dict[str, WeightedReward]:
        """Returns the rewards by name."""
        return self.parts

    def part_key(self, name: str) -> str:
        """Returns the dotted key of a part."""
        return f"reward.parts.{name}.reward"


Reward = Annotated[UltraRMReward | LogRatioReward | FunctionReward | SumReward, Field(discriminator="kind")]
