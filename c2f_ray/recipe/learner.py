"""What all learners have in common: ranks, ZeRO, adapters, and the optimizer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from c2f_ray.recipe.base import Count, Positive, Section
from c2f_ray.recipe.reward import Reward

# DeepSpeed's keys that a recipe has fields of its own for.
DEEPSPEED_KEYS = {
    "train_batch_size": "prompts.per_step",
    "train_micro_batch_size_per_gpu": "learner.tokens_per_microbatch",
    "gradient_accumulation_steps": "learner.tokens_per_microbatch",
    "gradient_clipping": "learner.optimizer.max_grad_norm",
    "optimizer": "learner.optimizer",
    "scheduler": "learner.optimizer.schedule",
    "bf16": "policy.dtype",
    "data_types": "policy.dtype",
    "fp16": "policy.dtype",
    "zero_force_ds_cpu_optimizer": "learner.offload",
    "zero_optimization.stage": "learner.zero_stage",
    "zero_optimization.offload_optimizer": "learner.offload",
    "zero_optimization.offload_param": "learner.offload",
    "activation_checkpointing": "learner.gradient_checkpointing",
}


class Optimizer(Section):
    """AdamW (arXiv 1711.05101) and its learning rate."""

    lr: Positive
    """Highest learning rate."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """Decay rates of the two moments. Default: ReMax's code."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls after the warm-up: not at all, or to 0 at the end of the run."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps in which the learning rate rises from 0."""
    max_grad_norm: Positive = 1.0
    """Largest norm of the gradient; a larger one is scaled down. Default: ReMax's code."""


class Lora(Section):
    """LoRA (arXiv 2106.09685): a target's weight W becomes W + alpha / rank * B A, and only A and B learn."""

    rank: Count
    """Rank of the adapters."""
    alpha: Positive
    """Scale of the adapters, before the division by `rank`."""
    targets: Annotated[list[str], Field(min_length=1)]
    """Names of linear layers, such as q_proj."""


@dataclass(frozen=True)
class Passes:
    """What one update does with one model: for each of these its whole batch goes through it."""

    model: Literal["policy", "critic"]
    forwards: int  # without gradient, the reference's among them
    backwards: int  # forward and backward
    optimizer_steps: int


class LearnerBase(Section):
    """Settings of every learner. What other modules must know about an algorithm are the facts at the end."""

    ranks: Count = 1
    """Number of learner ranks (data parallelism)."""
    gpus_per_rank: Annotated[int, Field(ge=0, le=1)] = 1
    """GPUs of one rank. 0 trains on the CPU."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """Stage of DeepSpeed's ZeRO (arXiv 1910.02054): what is divided among the ranks."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What is moved to CPU memory. `optimizer` needs ZeRO stage 1, `all` stage 3."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    tokens_per_microbatch: Count = 16384
    """Tokens of one micro-batch. Where sequences are not packed: longest sequence times number of sequences."""
    packing: bool | None = None
    """Put sequences one after the other, without padding. null: on GPUs only."""
    lora: Lora | None = None
    """Adapters of the policy. null trains all its weights."""
    optimizer: Optimizer
    """Optimizer of the policy."""
    max_bad_updates: Count = 3
    """Updates in a row that are not finite, after which the run ends."""
    deepspeed: dict[str, Any] = {}
    """Further settings of DeepSpeed, passed on unchanged."""
    threads: Count | None = None
    """Threads of one rank on the CPU. null: the cores of the node, divided among the ranks."""
    timeout_s: Positive = 3600
    """Seconds that one update, weight transfer, checkpoint or export may take."""

    @model_validator(mode="after")
    def _stage_allows_offload(self) -> "LearnerBase":
        needed = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(f"offload {self.offload!r} needs zero_stage {needed} or more, not {self.zero_stage}")
        return self

    @model_validator(mode="after")
    def _deepspeed_has_the_rest_only(self) -> "LearnerBase":
        zero = self.deepspeed.get("zero_optimization", {})
        given = [*self.deepspeed, *(f"zero_optimization.{key}" for key in (zero if isinstance(zero, dict) else ()))]
        for key in given:
            if key in DEEPSPEED_KEYS:
                raise ValueError(f"deepspeed: {key} is what {DEEPSPEED_KEYS[key]} decides; set that instead")
        return self

    needs_greedy: ClassVar[bool] = False
    """Each prompt also gets a greedy rollout."""
    has_critic: ClassVar[bool] = False
    """A critic learns beside the policy."""
    baseline_metric: ClassVar[str | None] = None
    """Name of the metric that has the mean baseline."""
    min_samples_per_prompt: ClassVar[int] = 1
    """Least `rollout.samples_per_prompt`."""
    can_pipeline: ClassVar[bool] = True
    """The next step may be sampled while the learner works."""
    guides_length: ClassVar[bool] = True
    """It has a critic or a baseline, which a logistic length rule observes."""
    needs_heldout: ClassVar[bool] = False
    """A step ends with the held-out prompts of `evaluate`."""

    @property
    def has_reference(self) -> bool:
        """Returns True where the policy that the run started from is kept, frozen."""
        return False

    @property
    def names_a_critic(self) -> bool:
        """Returns True where the critic starts from a model that no other section names."""
        return False

    @property
    def keeps_start(self) -> bool:
        """Returns True where the weights of the start stay on disk for the whole run."""
        return False

    def critic_model(self, policy: str, reward: Reward) -> str | None:
        """Returns the folder or hub name that the critic starts from; None without a critic."""
        return None

    def with_models(self, rename: Callable[[str], str]) -> Self:
        """Returns the same section with the models that it names renamed."""
        return self

    def most_ranks(self, samples: int) -> int:
        """Returns the largest number of ranks that all have work in an update on so many samples."""
        return samples

    def learned_samples(self, prompts: int, samples_per_prompt: int) -> int:
        """Returns how many samples of a step's an update learns from, at the most."""
        return prompts * samples_per_prompt

    def passes(self, samples: int) -> list[Passes]:
        """Returns what an update on so many samples does with each model."""
        raise NotImplementedError

    @property
    def packs(self) -> bool:
        """Returns True where sequences are packed."""
        return self.gpus_per_rank > 0 if self.packing is None else self.packing
