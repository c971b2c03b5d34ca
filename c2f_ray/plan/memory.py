"""Bytes that each role needs on one GPU, and beside it in its node's memory.

Formulas follow what DeepSpeed 0.19, transformers 5.19 and vLLM 0.32 allocate as `learner/engine.py` and
`adapters/vllm.py` sets them up. `benchmarks/memory.py` compares those of the learner with real ranks.
"""

from dataclasses import dataclass

from c2f_ray.plan.model import ModelShape
from c2f_ray.recipe import LearnerBase, Lora, ModelReward, Recipe
from c2f_ray.recipe.roles import Scorer

GIB = 2**30
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of an element
MASTER, MOMENTS, GRADIENT = 4, 8, 4  # bytes of an element: float32 weights, AdamW's two moments, summed gradients
CHUNK_TOKENS = 1024  # whose logits exist together; algorithms/logprobs.py's, which imports torch
LOGITS = 12  # bytes of a token and word at the peak of the output layer: three float32 tensors
# What is none of torch's tensors: CUDA's context and graphs, NCCL's buffers, gaps between tensors. Ours, a guess.
CUDA_BYTES = 2 * GIB
ENGINE_TOKENS = 16384  # that vLLM computes together at the most, by its default on large GPUs
# DeepSpeed's defaults, in elements.
ZERO_DEFAULTS = {"reduce_bucket_size": 5e8, "stage3_max_live_parameters": 1e9, "sub_group_size": 1e9}


@dataclass(frozen=True)
class Memory:
    """The most bytes at any moment, by what they are for."""

    gpu: dict[str, float]
    host: dict[str, float]  # the same process's, in its node's memory

    @property
    def total(self) -> float:
        return sum(self.gpu.values())


def learner_memory(recipe: Recipe, policy: ModelShape, critic: ModelShape | None) -> Memory:
    """Of one rank. ``critic`` is PPO's; its output layer, which it has not, is not counted."""
    learner, width = recipe.learner, WIDTH[recipe.policy.dtype]
    models = [(policy.parameters, trainable(policy, learner.lora), policy.embedding)]
    if critic is not None:
        models.append((critic.trunk, critic.trunk, critic.embedding))
    gpu: dict[str, float] = {}
    host: dict[str, float] = {}
    largest_bucket = 0.0
    for parameters, learning, largest in models:
        found = _states(learner, width, parameters, learning, largest)
        for parts, total in zip(found, (gpu, host), strict=True):
            for name, size in parts.items():
                total[name] = total.get(name, 0) + size
        largest_bucket = max(largest_bucket, min(_zero(learner, "reduce_bucket_size"), learning))
    # Both models' gradients are summed before either takes its step; buckets and activations come one after the other.
    if learner.has_reference and learner.lora is None:
        cut = learner.ranks if learner.zero_stage == 3 else 1
        (host if learner.offload == "all" else gpu)["reference"] = width * policy.parameters / cut
    gpu["buckets"] = width * largest_bucket * (len(models) if learner.zero_stage == 3 else 1)
    if learner.zero_stage == 3:
        gpu["gathered weights"] = width * min(_zero(learner, "stage3_max_live_parameters"), policy.parameters)
    tokens = max(learner.tokens_per_microbatch, recipe.prompts.max_tokens + recipe.length.max_tokens)
    gpu["activations"] = activations(policy, width, tokens, checkpointing=learner.gradient_checkpointing)
    if learner.zero_stage == 3 and learner.offload == "none":  # the step copies gradients, with no activations beside
        share = max(learning for _, learning, _ in models) / learner.ranks
        copied = GRADIENT * min(share, _zero(learner, "sub_group_size")) - gpu["gathered weights"]
        gpu["activations"] = max(gpu["activations"], copied)
    if learner.gpus_per_rank:
        gpu["CUDA, NCCL"] = CUDA_BYTES
    return Memory(gpu, host)


def trainable(shape: ModelShape, lora: Lora | None) -> float:
    """Parameters that learn: all, or those of the adapters: rank * (in + out) for each matrix."""
    if lora is None:
        return shape.parameters
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    sizes = {
        "q_proj": shape.hidden + queries,
        "k_proj": shape.hidden + keys,
        "v_proj": shape.hidden + keys,
        "o_proj": queries + shape.hidden,
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), shape.experts * (shape.hidden + shape.intermediate)),
    }
    return lora.rank * shape.layers * sum(size for name, size in sizes.items() if name in lora.targets)


def _zero(learner: LearnerBase, setting: str) -> float:
    return learner.deepspeed.get("zero_optimization", {}).get(setting, ZERO_DEFAULTS[setting])


def _states(
    learner: LearnerBase, width: int, parameters: float, learning: float, largest: float
) -> tuple[dict[str, float], dict[str, float]]:
    """(GPU's, host's) bytes of one model that learns: weights, summed gradients, float32 copy and AdamW's moments."""
    share = learning / learner.ranks if learner.zero_stage else learning
    # Without ZeRO weights, then float32, are their own masters.
    optimizer = (MASTER * (learner.zero_stage > 0) + MOMENTS) * share
    weights = width * (parameters / learner.ranks if learner.zero_stage == 3 else parameters)
    gradients = GRADIENT * share
    if learner.zero_stage < 2:  # summed whole, and cut when the optimizer steps
        gradients = GRADIENT * learning + width * learning * (width == 2)
    elif learner.zero_stage == 2 and width == 4 and learner.gradient_checkpointing:
        gradients *= 2  # those of a micro-batch lie beside the sum; without checkpointing they take activations' place
    if learner.offload == "none":
        return {"weights": weights, "gradients": gradients, "optimizer": optimizer}, {}
    if learner.zero_stage == 3:  # summed in CPU memory, and copied for the step
        gpu, host = {"weights": weights}, {"gradients": 2 * gradients, "optimizer": optimizer}
        return (gpu, host) if learner.offload == "optimizer" else ({}, gpu | host)
    # Summed on the GPU; CPU memory has a copy of the sum, and what the rounded weights are sent back from.
    host = {"gradients": GRADIENT * share, "optimizer": optimizer + width * share}
    return {"weights": weights, "gradients": gradients + width * largest}, host


def activations(shape: ModelShape, width: int, tokens: float, *, checkpointing: bool) -> float:
    """Bytes that transformers' decoder layers keep for the backward pass, and the most that is computed beside them.

    Of each token a layer keeps, for its two norms, a float32 input, the normalised input and what the norm gives; the
    queries, keys and values and what attention makes of them; and four tensors of the feed-forward layer. With
    checkpointing it keeps its input, and one layer at a time has the rest, and gradients of it. Before that the output
    layer has a chunk's logits.
    """
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    feed_forward = 4 * shape.intermediate * shape.experts_per_token
    layer = tokens * (2 * (4 + 2 * width) * shape.hidden + width * (2 * queries + 2 * keys + feed_forward))
    logits = LOGITS * shape.vocabulary * min(tokens, CHUNK_TOKENS)
    if checkpointing:
        return tokens * shape.layers * width * shape.hidden + max(logits, 1.5 * layer)
    return shape.layers * layer + logits


def forward_bytes(shape: ModelShape, width: int, tokens: float) -> float:
    """What one layer holds at the most in a forward pass without gradient."""
    return tokens * (4 * width * shape.hidden + 3 * width * shape.intermediate * shape.experts_per_token)


@dataclass(frozen=True)
class Engine:
    """A rollout actor's memory and what its KV cache has room for."""

    memory: Memory  # without the KV cache
    kv_tokens: float  # of all sequences together
    in_flight: int  # sequences at the limit that are decoded at the same time


def engine_memory(recipe: Recipe, policy: ModelShape, gpu_memory: float, response: int) -> Engine:
    """Of one GPU of a rollout actor whose responses have ``response`` tokens; vLLM fills its share with KV cache."""
    rollout, width = recipe.rollout, WIDTH[recipe.policy.dtype]
    workers = max(1, rollout.gpus_per_actor)
    own = {"weights": width * policy.parameters / workers}
    if rollout.gpus_per_actor:
        own["activations"] = forward_bytes(policy, width, ENGINE_TOKENS) / workers
        own["CUDA, NCCL"] = CUDA_BYTES
        cache = max(0.0, rollout.memory * gpu_memory - sum(own.values()))
    else:
        cache = rollout.memory * GIB
    kv_tokens = cache * workers / (width * policy.kv_elements)
    in_flight = min(rollout.max_num_seqs, int(kv_tokens // (recipe.prompts.max_tokens + response)))
    return Engine(Memory(own, {}), kv_tokens, in_flight)


def reward_memory(scorer: Scorer, shape: ModelShape | None) -> Memory:
    """Of one GPU of a reward worker. A log ratio's model is a vLLM engine, and has a prompt's logits whole."""
    reward = scorer.reward
    if not isinstance(reward, ModelReward) or shape is None:
        return Memory({}, {})
    width, gpus = WIDTH[reward.dtype], max(1, reward.gpus_per_worker)
    gpu = {
        "weights": width * (shape.parameters if reward.generates else shape.trunk) / gpus,
        "activations": forward_bytes(shape, width, reward.tokens_per_batch) / gpus,
    }
    if reward.generates:
        gpu["logits"] = LOGITS * shape.vocabulary * reward.max_tokens
        gpu["KV cache of one sequence"] = width * shape.kv_elements * reward.max_tokens / gpus
    if reward.gpus_per_worker:
        gpu["CUDA, NCCL"] = CUDA_BYTES
    return Memory(gpu, {})
