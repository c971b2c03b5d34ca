"""DeepSpeed around the models: everything in c2f_ray that knows how DeepSpeed is set up.

Import it inside a rank's process only, after its environment is set: DeepSpeed chooses its accelerator at import.
"""

import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, distributed, nn
from torch.nn.utils import get_total_norm
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from c2f_ray.adapters.deepspeed import disable_shared_memory_collective
from c2f_ray.learner.logprobs import ResponseLogprobs
from c2f_ray.learner.packing import PACKED
from c2f_ray.learner.schedule import lr_factor
from c2f_ray.learner.values import ResponseValues
from c2f_ray.recipe import LearnerBase, Optimizer, Policy
from c2f_ray.weights.source import Gather, no_gather

# A reward model's head: UltraRM's name, and that of transformers' sequence classifiers.
HEADS = ("regression_head.weight", "score.weight")


def join_process_group(store: distributed.Store, rank: int, learner: LearnerBase, timeout_s: float) -> None:
    """Gloo on CPUs, NCCL on GPUs. A collective whose peer is gone fails after ``timeout_s``."""
    distributed.init_process_group(
        backend="nccl" if learner.gpus_per_rank else "gloo",
        store=store,
        rank=rank,
        world_size=learner.ranks,
        timeout=timedelta(seconds=timeout_s),
    )
    disable_shared_memory_collective()
    deepspeed.init_distributed()


def load_policy(policy: Policy, learner: LearnerBase, *, entropy_gradient: bool = False) -> ResponseLogprobs:
    model = _load(AutoModelForCausalLM, policy.model, policy, learner)
    if learner.lora is not None:
        from c2f_ray.learner.lora import add_adapters

        add_adapters(model, learner.lora)
    return ResponseLogprobs(model, entropy_gradient=entropy_gradient)


def load_critic(model: str, policy: Policy, learner: LearnerBase) -> ResponseValues:
    """The critic from a policy's or a reward model's folder, or from the hub, with the policy's settings."""
    return ResponseValues(_load(AutoModel, model, policy, learner), _head(model))


def _load(kind: Any, model: str, policy: Policy, learner: LearnerBase) -> PreTrainedModel:
    """With every dropout off: a rollout's logprobs are those of the whole model. Raises where weights are missing."""
    dtype = getattr(torch, policy.dtype)
    # While this object lives, transformers cuts every parameter over the ranks as it loads it.
    cut = HfDeepSpeedConfig(_config(dtype, learner)) if learner.zero_stage == 3 else None
    loaded, info = kind.from_pretrained(
        model,
        dtype=dtype,
        attn_implementation=PACKED if learner.packs else "sdpa",
        output_loading_info=True,
    )
    del cut
    if info["missing_keys"]:
        raise ValueError(f"{model} lacks weights that would start at random: {sorted(info['missing_keys'])[:5]}")
    for module in loaded.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return loaded


def _head(model: str) -> Tensor | None:
    folder = Path(model)
    if not folder.is_dir():
        folder = Path(snapshot_download(model, allow_patterns="*.safetensors"))
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in HEADS:
                if name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                    return tensors.get_tensor(name)
    return None


class TrainedModel:
    """A model under DeepSpeed with an optimizer of its own, whose learning rate follows the steps that it has taken."""

    def __init__(
        self,
        module: ResponseLogprobs | ResponseValues,
        learner: LearnerBase,
        optimizer: Optimizer,
        total_steps: int,
    ) -> None:
        """``total_steps`` of the optimizer in the whole run, for the schedule."""
        if learner.gradient_checkpointing:
            module.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.module = module
        self.optimizer = optimizer
        self.total_steps = total_steps
        self.steps = 0  # taken
        self.num_ranks = learner.ranks
        self.engine: DeepSpeedEngine
        learning: Any = [parameter for parameter in module.parameters() if parameter.requires_grad]
        config = _config(module.model.dtype, learner, optimizer)
        self.engine, *_ = deepspeed.initialize(model=module, model_parameters=learning, config=config)
        self.engine.train()
        # Where DeepSpeed does not tell the gradient's norm.
        self.own_norm = learner.zero_stage == 0 and module.model.dtype == torch.float32

    @property
    def gather(self) -> Gather:
        """The context that gathers parameters on every rank, a collective; only ZeRO-3 partitions them."""
        return deepspeed.zero.GatheredParameters if self.engine.zero_optimization_stage() == 3 else no_gather

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of the sum of all ranks' losses; ``last`` before the optimizer's step."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.num_ranks)  # DeepSpeed takes the mean over ranks

    def step(self) -> tuple[float, float]:
        """(learning rate, gradient's norm before clipping).

        A gradient that is not finite is discarded, nothing else is changed, and the norm returned is infinite.
        """
        lr = self.optimizer.lr * lr_factor(self.optimizer, self.steps, self.total_steps)
        assert self.engine.optimizer is not None
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        norm: float | None = None
        if self.own_norm:
            norm = float(get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None]))
            if not math.isfinite(norm):
                self.engine.zero_grad()
                return lr, math.inf
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        assert norm is not None
        self.steps += math.isfinite(norm)
        return lr, float(norm)


def frozen(module: ResponseLogprobs, learner: LearnerBase) -> nn.Module:
    """The module on this rank's device, to be run without gradients; under ZeRO-3 cut and offloaded as the policy."""
    module.eval().requires_grad_(False)
    if learner.zero_stage < 3:
        return module.to(get_accelerator().current_device_name())
    engine, *_ = deepspeed.initialize(model=module, config=_config(module.model.dtype, learner))
    engine.eval()  # which returns nothing
    return engine


def _config(dtype: torch.dtype, learner: LearnerBase, optimizer: Optimizer | None = None) -> dict[str, Any]:
    passed_on = learner.deepspeed  # without any key that is set here: the recipe is refused otherwise
    zero: dict[str, Any] = {**passed_on.get("zero_optimization", {}), "stage": learner.zero_stage}
    if learner.offload != "none" and optimizer is not None:
        zero["offload_optimizer"] = {"device": "cpu"}
    if learner.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    trained: dict[str, Any] = {}
    if optimizer is not None:
        adam = {"lr": optimizer.lr, "betas": optimizer.betas, "eps": 1e-8, "weight_decay": optimizer.weight_decay}
        adam |= {"torch_adam": True, "fused": True}  # its own would need a compiler; fused copies no gradient
        trained = {
            "optimizer": {"type": "AdamW", "params": adam},
            "gradient_clipping": optimizer.max_grad_norm,
            "zero_force_ds_cpu_optimizer": False,
        }
    return (
        passed_on
        | {
            # As far as DeepSpeed knows there is one micro-batch; `backward` is told which one is an update's last.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_optimization": zero,
            "bf16": {"enabled": dtype == torch.bfloat16},
            # In bfloat16 the sum over hundreds of micro-batches would lose what each adds.
            "data_types": {"grad_accum_dtype": "fp32"},
        }
        | trained
    )
