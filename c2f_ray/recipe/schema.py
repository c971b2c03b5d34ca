"""What a recipe may say: one model per section, one documented field per line.

Nothing here imports torch, so a recipe can be checked on any machine in well under a second.
Where no paper is named for a default, the default is ours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from c2f_ray.recipe.location import Location

Dtype = Literal["float32", "bfloat16", "float16"]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
FunctionPath = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class Run(Section):
    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]  # the run's folder is `folder/name`
    folder: str = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    steps: Count | None = None  # stop after so many updates; either this or `epochs`
    epochs: Count | None = None  # stop after so many passes over the prompts
    deterministic: bool = False  # compose batches by sample id: the same seed then gives the same bytes
    trace: bool = False  # every shard and scoring call goes into trace.json, where the stages always are
    wandb: str | None = None  # a project of Weights & Biases; the key is the environment's WANDB_API_KEY

    @model_validator(mode="after")
    def _one_end(self) -> "Run":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self


class Cluster(Section):
    placement: Literal["PACK", "SPREAD"] = "PACK"  # actors on few nodes, or on many
    start_timeout_s: Positive = 1800  # from asking for an actor to its model being loaded
    max_restarts: Annotated[int, Field(ge=0)] = (
        10  # of rollout actors together, and of the learner, in one start of a run
    )


class Policy(Section):
    model: Location  # Hugging Face folder, or a name on the hub
    chat_template: Location = "model"  # `model`: its own; `plain`: ours for base models; else a path to a .jinja file
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the engines and of the learner's forward


class Prompts(Section):
    source: Location  # a .jsonl or .parquet file, or the name of a Hugging Face dataset
    split: str = "train"  # of a Hugging Face dataset
    field: str = "messages"  # a field that holds text, or chat messages
    turns: Literal["all", "first"] = "all"  # of chat messages: up to the last user message, or the first
    system: str | None = None  # system message put before every prompt
    num_prompts: Count | None = None  # use a seeded random choice of so many; all when not given
    max_tokens: Count = 384  # longest rendered prompt
    too_long: Literal["drop", "refuse"] = "drop"  # what to do with a longer one
    per_step: Count = 128  # prompts in one step
    uniform_over: str | None = None  # a field, such as the data's source, all of whose values are drawn equally often
    shuffle: bool = True  # a new seeded order in every epoch


class LengthBase(Section):
    needs_guide: ClassVar[bool] = False  # the rule observes a critic or a baseline

    @property
    def first_tokens(self) -> int:
        """Returns the first step's limit."""
        raise NotImplementedError


class FixedLength(LengthBase):
    rule: Literal["fixed"]
    max_tokens: Count  # response limit of every step

    @property
    def first_tokens(self) -> int:
        """Returns the limit, which never changes."""
        return self.max_tokens


GrowingLength = TypeVar("GrowingLength", bound="LinearLength | LogisticLength")


def _limits_in_order(length: GrowingLength) -> GrowingLength:
    if length.start_tokens > length.max_tokens:
        raise ValueError(f"start_tokens {length.start_tokens} is more than max_tokens {length.max_tokens}")
    return length


class LinearLength(LengthBase):
    rule: Literal["linear"]
    start_tokens: Count
    max_tokens: Count
    over_steps: Count  # the limit grows evenly and reaches its maximum after so many steps

    @property
    def first_tokens(self) -> int:
        """Returns the limit that growth starts from."""
        return self.start_tokens

    @model_validator(mode="after")
    def _grows(self) -> "LinearLength":
        return _limits_in_order(self)


class LogisticLength(LengthBase):
    """Continuous Maximization (arXiv 2406.08657); coefficients and limits are unpublished, so ours."""

    needs_guide: ClassVar[bool] = True

    rule: Literal["logistic"]
    start_tokens: Count
    max_tokens: Count
    max_step_tokens: Positive  # growth of the limit in one step when the logistic is 1
    reward_weight: float = 1.0  # of the standardised mean reward
    critic_weight: float = 0.5  # of the standardised critic loss; of the reward minus greedy spread without a critic
    bias: float = 0.0
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.9  # of the running mean and variance
    z_clip: Positive = 3.0  # standardised features are clipped to +- this

    @property
    def first_tokens(self) -> int:
        """Returns the limit that growth starts from."""
        return self.start_tokens

    @model_validator(mode="after")
    def _grows(self) -> "LogisticLength":
        return _limits_in_order(self)


Length = Annotated[FixedLength | LinearLength | LogisticLength, Field(discriminator="rule")]


class Rollout(Section):
    actors: Count = 1  # one vLLM engine each
    gpus_per_actor: Annotated[int, Field(ge=0)] = 1  # tensor parallelism; 0 runs the engine on the CPU
    temperature: Positive = 1.0  # logprobs, and with them the losses, are those of temperature 1 all the same
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    samples_per_prompt: Count = 1
    shard_samples: Count = 32  # trajectories handed over together
    max_num_seqs: Count = 256  # sequences that one engine decodes at the same time
    memory: Positive = 0.9  # share of a GPU's memory for the engine; GiB of KV cache on the CPU
    max_staleness: Literal[0, 1, 2] = 0  # weight versions that samples may lag; from 1 a step samples as another learns
    in_flight: Literal["finish", "continue"] = "finish"  # samples under way when new weights come: on the old, or those
    wait_for: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of a step's prompts; the next one finishes the others
    threads: Count | None = None  # of one engine on the CPU; the node's cores over the actors when not given
    timeout_s: Positive = 1800  # of one step's rollouts


class RewardBase(Section):
    workers: Count = 1
    timeout_s: Positive = 1800  # a worker that owes scores and gives none for so long is replaced
    attempts: Count = 3  # at one sample, each by another worker where there is one
    on_failure: Literal["stop", "drop"] = "stop"  # the run, or the sample; it is saved in aside/ either way
    truncation_penalty: Annotated[float, Field(ge=0)] = 0.0  # taken off the reward of a response that the limit cut

    # Facts of the kind, for those who run it or plan it.
    model_signs: ClassVar[dict[str, float]] = {}  # fields that name models, and the sign of each model's score
    generates: ClassVar[bool] = False  # a vLLM engine reads probabilities, and always generates one token more
    is_sum: ClassVar[bool] = False

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
    threads: Count | None = None  # of one worker on the CPU; the node's cores over the workers when not given
    gpus_per_worker: Annotated[int, Field(ge=0)] = 1
    dtype: Dtype = "float16"
    tokens_per_batch: Count = 16384  # padding included
    max_wait_s: Annotated[float, Field(ge=0)] = 0.05  # for a batch to fill up; deterministic runs do not wait
    max_tokens: Count = 4096  # longer conversations lose their first tokens
    append_eos: Literal["finished", "always", "never"] = "finished"  # which responses get an end-of-sequence token

    @property
    def gpus(self) -> int:
        """Returns the GPUs of one worker."""
        return self.gpus_per_worker


class UltraRMReward(ModelReward):
    model_signs: ClassVar[dict[str, float]] = {"model": 1.0}

    kind: Literal["ultrarm"]
    model: Location
    separator: str = "\n"  # between the turns: the model card's code says two, its examples and ReMax's one


class LogRatioReward(ModelReward):
    """Log probability of the response under one model minus that under another (RewardBench, arXiv 2403.13787).

    Each model has `workers` workers of `gpus_per_worker` GPUs (tensor parallelism).
    """

    model_signs: ClassVar[dict[str, float]] = {"policy_model": 1.0, "reference_model": -1.0}
    generates: ClassVar[bool] = True

    kind: Literal["log_ratio"]
    policy_model: Location
    reference_model: Location
    aggregate: Literal["sum", "mean"] = "sum"  # sum: RewardBench; mean: per token, ours
    chat_template: Location = (
        "model"  # `model`: the policy model's own; `plain`: ours for base models; else a .jinja file
    )
    memory: Positive = 0.9  # share of a GPU's memory for the engine; GiB of KV cache on the CPU


class FunctionReward(RewardBase):
    kind: Literal["function"]
    function: FunctionPath  # module:name
    timeout_s: Positive = 600


OneReward = Annotated[UltraRMReward | LogRatioReward | FunctionReward, Field(discriminator="kind")]


class WeightedReward(Section):
    weight: float
    reward: OneReward


class SumReward(Section):
    """A weighted sum of rewards, each of which is also logged by its name."""

    kind: Literal["sum"]
    parts: Annotated[dict[Annotated[str, Field(pattern=r"^[a-z]\w*$")], WeightedReward], Field(min_length=1)]

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


class Optimizer(Section):
    lr: Positive
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [
        0.9,
        0.95,
    ]  # ReMax's code
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0  # optimizer steps over which the rate rises
    max_grad_norm: Positive = 1.0  # ReMax's code


class Lora(Section):
    """LoRA (arXiv 2106.09685): a target's weight W becomes W + alpha / rank * B A, and only A and B learn."""

    rank: Count
    alpha: Positive
    targets: Annotated[list[str], Field(min_length=1)]  # names of linear layers, such as q_proj


@dataclass(frozen=True)
class Passes:
    """What one update does with one model: for each of these its whole batch goes through it."""

    model: Literal["policy", "critic"]
    forwards: int  # without gradient, the reference's among them
    backwards: int  # forward and backward
    optimizer_steps: int


class LearnerBase(Section):
    # Facts of the algorithm, for those who run it or plan it.
    needs_greedy: ClassVar[bool] = False  # each prompt also gets a greedy rollout
    has_critic: ClassVar[bool] = False
    baseline_metric: ClassVar[str | None] = None  # the name under which the mean baseline is logged
    min_samples_per_prompt: ClassVar[int] = 1
    can_pipeline: ClassVar[bool] = True  # the next step may be sampled while the learner works
    guides_length: ClassVar[bool] = True  # it has a critic or a baseline, which a logistic length rule observes
    needs_heldout: ClassVar[bool] = False  # a step ends with the held-out prompts of `evaluate`

    ranks: Count = 1
    gpus_per_rank: Annotated[int, Field(ge=0, le=1)] = 1
    zero_stage: Literal[0, 1, 2, 3] = 2
    offload: Literal["none", "optimizer", "all"] = "none"  # to CPU memory
    gradient_checkpointing: bool = False
    tokens_per_microbatch: Count = 16384  # padding included: longest sequence times sequences, where not packed
    packing: bool | None = None  # sequences one after the other, without padding; null: on GPUs
    lora: Lora | None = None  # adapters of the policy; null trains all its weights
    optimizer: Optimizer
    max_bad_updates: Count = 3  # stop the run after so many updates in a row that were not finite
    deepspeed: dict[str, Any] = {}  # the rest of DeepSpeed's own configuration, passed on as it is
    threads: Count | None = None  # of one rank on the CPU; the node's cores over the ranks when not given
    timeout_s: Positive = 3600  # of one update, weight transfer, checkpoint or export

    @model_validator(mode="after")
    def _stage_allows_offload(self) -> "LearnerBase":
        needed = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(f"offload {self.offload!r} needs zero_stage {needed} or more, not {self.zero_stage}")
        return self

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

    def critic_model(self, policy: str, reward: "Reward") -> str | None:
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
        return self.gpus_per_rank > 0 if self.packing is None else self.packing

    @model_validator(mode="after")
    def _deepspeed_has_the_rest_only(self) -> "LearnerBase":
        zero = self.deepspeed.get("zero_optimization", {})
        given = [*self.deepspeed, *(f"zero_optimization.{key}" for key in (zero if isinstance(zero, dict) else ()))]
        for key in given:
            if key in DEEPSPEED_KEYS:
                raise ValueError(f"deepspeed: {key} is what {DEEPSPEED_KEYS[key]} decides; set that instead")
        return self


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


class ReinforceLearner(LearnerBase):
    """One policy gradient step from a single pass over the rollouts, with a KL penalty in the return."""

    kl_coefficient: Annotated[float, Field(ge=0)] = 0.1  # 0 drops the reference
    importance_clip: Annotated[float, Field(ge=1)] | None = None  # of each token's policy/sampler ratio; null: none

    @property
    def has_reference(self) -> bool:
        """Returns True where a KL penalty needs the policy that the run started from."""
        return self.kl_coefficient > 0

    def passes(self, samples: int) -> list[Passes]:
        """Returns what an update does with the policy: one step from a single pass."""
        return [Passes("policy", int(self.has_reference), 1, 1)]


class ReMaxLearner(ReinforceLearner):
    """ReMax (arXiv 2310.10505): one greedy rollout beside each sample, no critic."""

    needs_greedy: ClassVar[bool] = True
    baseline_metric: ClassVar[str | None] = "reward/greedy_mean"

    algorithm: Literal["remax"]
    kl_penalty: Literal["full_step", "one_step"] = "full_step"  # the model card's; the 2023 repository's
    reward_clip: Positive = 1.0  # of the reward minus the greedy rollout's
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0  # only `one_step` discounts

    @model_validator(mode="after")
    def _gamma_is_used(self) -> "ReMaxLearner":
        if self.kl_penalty == "full_step" and self.gamma != 1:
            raise ValueError(f"gamma {self.gamma} has no effect with kl_penalty full_step; leave it out")
        return self


class GroupBaselineLearner(ReinforceLearner):
    """Policy gradients whose baseline is the reward of the same draw's other samples: no critic, no greedy rollout."""

    min_samples_per_prompt: ClassVar[int] = 2
    baseline_metric: ClassVar[str | None] = "reward/baseline_mean"

    algorithm: Literal["group_baseline"]
    # RLOO, arXiv 2402.14740, section 3.3; GRPO's mean, arXiv 2402.03300, equation 3; and that over the deviation
    baseline: Literal["leave_one_out", "mean", "mean_and_deviation"] = "leave_one_out"


class Critic(Section):
    """A value head on a transformer. The head is the reward model's where there is one, and zero otherwise."""

    model: Location = "policy"  # `policy`, `reward`, or a folder with the policy's tokenizer
    optimizer: Optimizer
    warmup_steps: Annotated[int, Field(ge=0)] = 0  # first steps of the run, whose rollouts train the critic only


class PPOLearner(LearnerBase):
    """PPO (arXiv 1707.06347) with a critic on the same ranks; no greedy rollouts."""

    has_critic: ClassVar[bool] = True

    algorithm: Literal["ppo"]
    critic: Critic
    epochs: Count = 1  # passes over a step's rollouts
    minibatches: Count = 4  # optimizer steps in one pass; they divide a step's samples evenly
    clip_ratio: Positive = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None  # arXiv 1912.09729: bounds the ratio of bad tokens; say 3
    log_ratio_clip: Positive = 20.0  # log ratios, to the rollout's policy and to the reference, are clipped to +- this
    value_clip: Positive | None = 0.2  # how far from the rollout's value a value still learns; null for any
    entropy_coefficient: Annotated[float, Field(ge=0)] = 0.0
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    gae_lambda: Share = 0.95
    whiten_advantages: Literal["none", "unbiased", "biased"] = "unbiased"  # over all response tokens of a step
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_in: Literal["reward", "loss"] = "reward"  # a penalty in every token's reward, or a term of the loss
    kl_coefficient: Annotated[float, Field(ge=0)] = 0.05  # 0 drops the reference
    kl_target: Positive | None = None  # nats per response that the coefficient adapts to; null keeps it as it is
    normalise_reward: bool = False  # by the mean and standard deviation of all rewards so far, before the clip
    kl_stop: Positive | None = None  # nats per token from the rollout's policy: a minibatch beyond it is the last
    reward_clip: Positive = 5.0  # of the reward itself, before the KL penalty joins it
    importance_clip: Annotated[float, Field(ge=1)] | None = None  # of each token's policy/sampler ratio; null: none

    @model_validator(mode="after")
    def _kl_is_used(self) -> "PPOLearner":
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_in loss with kl_estimator k1 has no effect: its expected gradient is zero; use k2 or k3"
            )
        if self.kl_target is not None and self.kl_coefficient == 0:
            raise ValueError("kl_target has no effect on a kl_coefficient of 0; raise it above, or leave kl_target out")
        return self

    @property
    def has_reference(self) -> bool:
        """Returns True where a KL penalty needs the policy that the run started from."""
        return self.kl_coefficient > 0

    @property
    def names_a_critic(self) -> bool:
        """Returns True where the critic starts from a model that no other section names."""
        return self.critic.model not in ("policy", "reward")

    def critic_model(self, policy: str, reward: "Reward") -> str | None:
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
    """Iterative rejection sampling (Merlinite-7B-pt). A step is a round: keep each prompt's best of N, fine-tune on
    them, and sample `evaluate.prompts` to see what it brought. The best round becomes the coarse actor.
    """

    min_samples_per_prompt: ClassVar[int] = 2
    can_pipeline: ClassVar[bool] = False
    guides_length: ClassVar[bool] = False
    needs_heldout: ClassVar[bool] = True

    algorithm: Literal["rejection_sampling"]
    restart_from: Literal["start", "last_round"] = "last_round"  # what each round fine-tunes; the card leaves it open
    epochs: Count = 1  # passes over a round's responses
    responses_per_update: Count = 128  # in one optimizer step
    min_margin: Annotated[float, Field(ge=0)] | None = None  # of a best response over its prompt's mean reward
    top_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the best responses, by reward
    patience: Count = 1  # rounds without a better held-out reward after which the run ends

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


class Checkpoints(Section):
    every_steps: Count = 10  # beside the one after the last step
    keep_last: Count = 2
    keep_best: Annotated[int, Field(ge=0)] = 0  # beside the last ones, by their step's mean reward


class Weights(Section):
    bucket_mib: Count = 256  # tensors travel in packed buckets of this size
    timeout_s: Positive = 600  # of one whole transfer


class RatioRule(Section):
    """The ratio of some of a model's tensors: those of a range of layers, those whose name fits, or those of both."""

    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)] | None = None  # first, last
    modules: str | None = None  # a shell pattern for whole tensor names, such as "*.self_attn.*"
    ratio: Share | None = None
    gradient: Annotated[list[Share], Field(min_length=2)] | None = (
        None  # even distances over the layers, linear between
    )

    @model_validator(mode="after")
    def _one_ratio(self) -> "RatioRule":
        if (self.ratio is None) == (self.gradient is None):
            raise ValueError("give exactly one of ratio and gradient")
        if self.layers is None and self.modules is None and self.gradient is None:
            raise ValueError("give layers or modules; the ratio of all other tensors is the schedule's")
        if self.layers is not None and self.layers[0] > self.layers[1]:
            raise ValueError(f"layers are first and last, counted from 0; {self.layers[0]} is after {self.layers[1]}")
        return self


class RatioSchedule(Section):
    """A fine actor whose ratio is not the same everywhere. A tensor takes the first rule that fits it."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z]\w*$")]  # its folder is METHOD-NAME
    ratio: Share  # of tensors that no rule fits
    rules: Annotated[list[RatioRule], Field(min_length=1)]


MergeMethod = Literal["residue", "interpolate", "task_arithmetic", "slerp", "ties", "dare"]
MERGE_METHODS_WITH = {"scale": ("task_arithmetic", "ties", "dare")}
MERGE_METHODS_WITH |= dict.fromkeys(("coarse_density", "instruct_density"), ("ties", "dare"))


class Merge(Section):
    instruct: Location  # Hugging Face folder, or a name on the hub
    base: Location | None = None  # `policy.model` when not given
    coarse: Location | None = None  # the run's `coarse/` when not given
    methods: Annotated[list[MergeMethod], Field(min_length=1)] = ["residue"]
    ratios: list[Share] = []  # one fine actor for each, by each method
    schedules: list[RatioSchedule] = []  # and one for each of these
    scale: Positive = 1.0  # lambda of task_arithmetic, ties and dare: of everything that is added to the base
    coarse_density: Annotated[float, Field(gt=0, le=1)] = 0.5  # ties and dare: share of the coarse delta that is kept
    instruct_density: Annotated[float, Field(gt=0, le=1)] = (
        1.0  # of the instruct delta; 1: ratio 0 is the instruct model
    )
    allow: list[str] = []  # configuration fields in which the models may differ; `tokenizer` for their vocabularies
    dtype: Dtype | None = None  # of the files written; the instruct model's when not given
    timeout_s: Positive = 3600  # of one weight file, of which a merge writes about 32 for each fine actor

    @model_validator(mode="after")
    def _settings_are_used(self) -> "Merge":
        if not self.ratios and not self.schedules:
            raise ValueError("give ratios or schedules")
        for field, methods in MERGE_METHODS_WITH.items():
            changed = getattr(self, field) != type(self).model_fields[field].default
            if changed and not set(methods) & set(self.methods):
                raise ValueError(
                    f"{field} has no effect on methods {self.methods}; leave it out, or add {methods[0]!r}"
                )
        return self


class Choose(Section):
    """The best fine actor: the one with most of a metric, among those that are not worse than the instruct model in
    others. All are columns of the evaluation's table.
    """

    by: str = "reward"
    at_most_over_instruct: dict[str, float] = {}  # how much more of a metric it may have than the instruct model
    at_least_over_instruct: dict[str, float] = {}  # how much more it must have; below 0: how much less it may have

    @model_validator(mode="after")
    def _more_is_better(self) -> "Choose":
        if self.by in LESS_IS_BETTER:
            raise ValueError(f"by {self.by!r}: less of it is better; put it into at_most_over_instruct")
        return self


LESS_IS_BETTER = ("truncated", "repeated_lines", "perplexity", "kl_to_instruct")


class Perplexity(Section):
    texts: Location  # held-out texts: a .jsonl or .parquet file, or the name of a Hugging Face dataset
    split: str = "train"
    field: str = "text"
    num_texts: Count | None = None
    window_tokens: Annotated[int, Field(ge=2)] = 2048  # longer texts are cut, and each piece begins anew


class GeneralTask(Section):
    name: str  # of lm-eval, or of a task in include_path
    few_shot: Annotated[int, Field(ge=0)] = 0  # examples before each question
    metric: str = "acc"  # as lm-eval names it, such as acc_norm; with a filter: exact_match,strict-match


class LmEval(Section):
    """General tasks by EleutherAI's lm-eval, which the extra `tasks` installs."""

    tasks: Annotated[list[GeneralTask], Field(min_length=1)]
    include_path: str | None = None  # a folder of tasks in lm-eval's format, beside its own
    limit: Count | None = None  # questions of each task; all when not given
    chat_template: bool = False  # ask in the model's own template
    batch_size: Count = 16  # on the CPU; on GPUs vLLM batches
    timeout_s: Positive = 86400  # of all tasks of one model


class EndpointJudge(Section):
    kind: Literal["endpoint"]
    url: str  # of an OpenAI-compatible API, such as https://api.openai.com/v1
    model: str
    api_key_env: str | None = None  # the environment variable that holds the key; null where none is asked for
    parameters: dict[str, Any] = {"temperature": 0, "max_tokens": 1024}  # sent with every request as they are
    requests_at_once: Count = 8
    max_retries: Annotated[int, Field(ge=0)] = 5  # of one request
    timeout_s: Positive = 120  # of one request


class RewardJudge(Section):
    kind: Literal["reward"]  # the better answer is the one with more of the recipe's own reward


RECORD = "record."


class WinRate(Section):
    """Every model's answers beside those of one of them (Chat1M and AlpacaEval style)."""

    prompts: Location  # a .jsonl or .parquet file, or the name of a Hugging Face dataset
    split: str = "train"
    field: str = "messages"
    num_prompts: Count | None = None
    against: str = "instruct"  # the model that all others are compared with; `record.FIELD`: answers beside the prompts
    template: Location | None = (
        None  # a .jinja file: what an endpoint is asked; of messages, answer_a, answer_b and record
    )


class MTBench(Section):
    """Questions of two turns, each answer scored from 1 to 10 (MT-Bench, arXiv 2306.05685)."""

    questions: Location  # a .jsonl file in MT-Bench's own format: question_id, category, turns, and perhaps reference
    template: (
        Location  # a .jinja file: what the judge is asked; of turns, answers and reference up to the turn, and record
    )
    runs: Count = 1  # each samples its answers anew, at rollout.temperature


class Evaluate(Section):
    prompts: Location  # held-out questions: a .jsonl or .parquet file, or the name of a Hugging Face dataset
    split: str = "train"
    field: str = "messages"
    num_prompts: Count | None = None
    max_tokens: Count = 512  # of a response, decoded greedily
    models: Annotated[list[str], Field(min_length=1)] = ["*"]  # of base, instruct, coarse and the fine actors
    accuracy: FunctionPath | None = None  # module:name of a grader of one response
    perplexity: Perplexity | None = None  # of held-out texts
    kl_to_instruct: bool = False  # nats per token of each model's own responses, over the whole vocabulary
    lm_eval: LmEval | None = None
    judge: EndpointJudge | RewardJudge | None = Field(default=None, discriminator="kind")
    win_rate: WinRate | None = None
    mt_bench: MTBench | None = None
    timeout_s: Positive = 3600  # of all forwards of one model
    choose: Choose | None = None  # links the best fine actor as `fine/best`; null: none is chosen

    @model_validator(mode="after")
    def _judged_by_one_who_can(self) -> "Evaluate":
        endpoint = isinstance(self.judge, EndpointJudge)
        if self.mt_bench and not endpoint:
            raise ValueError("mt_bench: scores from 1 to 10 need a judge of kind endpoint")
        if self.win_rate and self.judge is None:
            raise ValueError("win_rate: give a judge")
        if self.win_rate and endpoint != (self.win_rate.template is not None):
            needs = "a judge of kind endpoint needs it" if endpoint else "only a judge of kind endpoint reads it"
            raise ValueError(f"win_rate.template: {needs}")
        if self.win_rate and not endpoint and self.win_rate.against.startswith(RECORD):
            raise ValueError("win_rate.against: answers beside the prompts need a judge of kind endpoint")
        if self.judge and not (self.win_rate or self.mt_bench):
            raise ValueError("judge: it has nothing to judge; give win_rate or mt_bench")
        return self


class Recipe(Section):
    run: Run
    cluster: Cluster = Cluster()
    policy: Policy
    prompts: Prompts
    length: Length
    rollout: Rollout
    reward: Reward
    learner: Learner
    weights: Weights = Weights()
    checkpoints: Checkpoints = Checkpoints()
    merge: Merge | None = None
    evaluate: Evaluate | None = None

    @property
    def critic_model(self) -> str | None:
        """Returns the folder or hub name that the critic starts from; None without a critic."""
        return self.learner.critic_model(self.policy.model, self.reward)

    @property
    def pipelined(self) -> bool:
        """Returns True where the next step is sampled while the learner works."""
        return self.rollout.max_staleness > 0

    @model_validator(mode="after")
    def _sections_agree(self) -> "Recipe":
        if (self.rollout.gpus_per_actor == 0) != (self.learner.gpus_per_rank == 0):
            raise ValueError(
                "rollout.gpus_per_actor and learner.gpus_per_rank: both 0 (CPU, weights over gloo) or both more "
                f"(GPU, weights over NCCL); not {self.rollout.gpus_per_actor} and {self.learner.gpus_per_rank}"
            )
        if self.rollout.gpus_per_actor > 0 and self.rollout.memory > 1:
            raise ValueError(
                f"rollout.memory: on a GPU it is a share of its memory, at most 1; not {self.rollout.memory}"
            )
        learner, algorithm = self.learner, self.learner.algorithm
        if self.rollout.samples_per_prompt < learner.min_samples_per_prompt:
            raise ValueError(
                f"rollout.samples_per_prompt: {self.rollout.samples_per_prompt}: {algorithm} compares a prompt's "
                f"samples; give {learner.min_samples_per_prompt} or more"
            )
        if learner.needs_heldout and self.evaluate is None:
            raise ValueError(f"evaluate: missing; {algorithm} measures each round on evaluate.prompts")
        if self.length.needs_guide and not learner.guides_length:
            raise ValueError(
                f"length.rule: {self.length.rule} observes a critic or a baseline, and {algorithm} has none; use fixed "
                "or linear"
            )
        if self.pipelined:
            if not learner.can_pipeline:
                raise ValueError(
                    f"rollout.max_staleness: {self.rollout.max_staleness} with {algorithm} has no meaning: "
                    "each round samples with the last one's weights; leave it out"
                )
            if getattr(learner, "importance_clip", None) is None:
                raise ValueError(
                    f"rollout.max_staleness: {self.rollout.max_staleness} makes samples off-policy; "
                    "set learner.importance_clip (2 is usual), which corrects for that"
                )
        if self.rollout.in_flight == "continue" and self.rollout.max_staleness == 0:
            raise ValueError(
                "rollout.in_flight: continue without rollout.max_staleness has no meaning: nothing is sampled as the "
                "learner learns; set rollout.max_staleness to 1"
            )
        if self.rollout.wait_for < 1 and self.rollout.max_staleness < 2:
            raise ValueError(
                f"rollout.wait_for: {self.rollout.wait_for:g} leaves samples to the next step, where their first "
                "tokens may be two weight versions old; set rollout.max_staleness to 2"
            )
        if self.run.deterministic and (self.rollout.in_flight == "continue" or self.rollout.wait_for < 1):
            raise ValueError(
                "run.deterministic: true with rollout.in_flight: continue or rollout.wait_for below 1 is not possible: "
                "how far a sample was when new weights came depends on time"
            )
        if self.policy.dtype == "bfloat16" and self.learner.zero_stage == 0:
            raise ValueError(
                "learner.zero_stage: 0 with policy.dtype bfloat16 is not offered: DeepSpeed's optimizer for it counts "
                "one step too many; use 1, which on one rank is the same"
            )
        starts_from_reward = isinstance(learner, PPOLearner) and learner.critic.model == "reward"
        if starts_from_reward and not isinstance(self.reward, UltraRMReward):
            raise ValueError(
                "learner.critic.model: 'reward' needs a reward model to start from, and reward.kind is "
                f"{self.reward.kind!r}; use 'policy' or a folder"
            )
        return self
