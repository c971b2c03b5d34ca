"""DeepSpeed around the policy: everything in c2f_ray that knows how DeepSpeed is set up.

Import it inside a rank's process only, after its environment is set: DeepSpeed chooses its accelerator at import.
"""

from datetime import timedelta
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import distributed, nn
from transformers import AutoModelForCausalLM

from c2f_ray.algorithms.logprobs import ResponseLogprobs
from c2f_ray.recipe.schema import LearnerBase, Policy
from c2f_ray.weights.source import Gather, no_gather


def join_process_group(store: distributed.Store, rank: int, learner: LearnerBase, timeout_s: float) -> None:
    """Gloo on CPUs, NCCL on GPUs. A collective whose peer is gone fails after ``timeout_s``."""
    distributed.init_process_group(
        backend="nccl" if learner.gpus_per_rank else "gloo",
        store=store,
        rank=rank,
        world_size=learner.ranks,
        timeout=timedelta(seconds=timeout_s),
    )
    # DeepSpeed's shared-memory collective would be built with a C++ compiler now; gloo does its work as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()


def load_policy(policy: Policy) -> ResponseLogprobs:
    """The policy's model with every dropout off: a rollout's logprobs are those of the whole model."""
    model = AutoModelForCausalLM.from_pretrained(
        policy.model,
        dtype=getattr(torch, policy.dtype),
        attn_implementation="sdpa",
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return ResponseLogprobs(model)


def start_engine(policy: ResponseLogprobs, dtype: str, learner: LearnerBase) -> DeepSpeedEngine:
    """The optimizer around the policy. Its learning rate is set before each update, in ``param_groups``."""
    if learner.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    engine, *_ = deepspeed.initialize(model=policy, config=_config(dtype, learner))
    engine.train()
    return engine


def _config(dtype: str, learner: LearnerBase) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": learner.zero_stage}
    if learner.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if learner.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    optimizer = learner.optimizer
    adam = {"lr": optimizer.lr, "betas": optimizer.betas, "eps": 1e-8, "weight_decay": optimizer.weight_decay}
    return {
        # As far as DeepSpeed knows there is one micro-batch; the rank itself says which backward is an update's last.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.max_grad_norm,
        "optimizer": {"type": "AdamW", "params": {**adam, "torch_adam": True}},  # its own would need a compiler
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bfloat16"},
    }


def gather(engine: DeepSpeedEngine) -> Gather:
    """What makes parameters whole on every rank, all ranks together: only ZeRO-3 cuts them."""
    return deepspeed.zero.GatheredParameters if engine.zero_optimization_stage() == 3 else no_gather
