"""Builds the vLLM engine of one rollout actor.

The engine core runs inside the actor, which then owns the step loop and hands each sample over as it finishes.
vllm is imported inside the functions: it reads `engine_env` once, at import.
"""

import os
from typing import TYPE_CHECKING, Any, Literal

import torch

from c2f_ray.recipe.schema import Policy, Rollout
from c2f_ray.weights.source import checksum
from c2f_ray.weights.transfer import transfer_backend

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

LoadFormat = Literal["dummy", "auto"]  # weights by a transfer, or from the model's folder


def engine_env(gpus: int) -> dict[str, str]:
    """Environment of an engine's process, which must be set before vllm is imported there."""
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    }
    if gpus == 0:
        env["TORCH_COMPILE_DISABLE"] = "1"  # the first logprobs would otherwise call a C++ compiler
    return env


def build_engine(policy: Policy, rollout: Rollout, max_model_tokens: int, load_format: LoadFormat) -> "LLM":
    """An engine for prompt and response of `max_model_tokens` together, on the GPUs that this process sees."""
    from vllm import LLM
    from vllm.config import WeightTransferConfig

    gpus = rollout.gpus_per_actor
    settings = _gpu_settings(rollout) if gpus else _cpu_settings(rollout, max_model_tokens)
    return LLM(
        policy.model,
        dtype=policy.dtype,
        load_format=load_format,
        max_model_len=max_model_tokens,
        max_num_seqs=rollout.max_num_seqs,
        enable_prefix_caching=True,
        weight_transfer_config=WeightTransferConfig(backend=transfer_backend(gpus)),
        seed=0,  # every request has its own
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **settings,
    )


def _gpu_settings(rollout: Rollout) -> dict[str, Any]:
    return {
        "tensor_parallel_size": rollout.gpus_per_actor,
        "distributed_executor_backend": "uni" if rollout.gpus_per_actor == 1 else "mp",
        "gpu_memory_utilization": rollout.memory,
    }


def _cpu_settings(rollout: Rollout, max_model_tokens: int) -> dict[str, Any]:
    _use_torch_linear()
    return {
        "distributed_executor_backend": "uni",
        "enforce_eager": True,
        "kv_cache_memory_bytes": int(rollout.memory * 2**30),
        # A seeded request cannot be prefilled in pieces on the CPU.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_model_tokens, 8192),
    }


def _use_torch_linear() -> None:
    """Keeps CPU linear layers as they were loaded.

    vLLM packs them for oneDNN and drops the weight, so that no checksum could see what the engine computes with.
    """
    from vllm.model_executor.layers import utils

    def dispatch(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = dispatch


def sampling_params(rollout: Rollout, seed: int, greedy: bool, max_tokens: int) -> "SamplingParams":
    """One sample, only its final output, with the logprob of each token before temperature and top_p."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0 if greedy else rollout.temperature,
        top_p=1.0 if greedy else rollout.top_p,
        seed=seed,
        max_tokens=max_tokens,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def parameters_checksum(model: torch.nn.Module) -> int:
    """For `LLM.apply_model`: the checksum of a worker's parameters (buffers, such as rotary tables, are not sent)."""
    return checksum(model.parameters())


def abandon_update(worker: Any) -> None:
    """For `LLM.collective_rpc`: ends a transfer that failed, so that the next one starts from no layer half loaded."""
    worker.worker._weight_update_active = False  # it depends on where the transfer stopped
    worker.start_weight_update()
    worker.finish_weight_update()


def reload_from(worker: Any, folder: str) -> None:
    """For `LLM.collective_rpc`: loads the weights of another folder of the same architecture in place."""
    worker.vllm_config.load_config.load_format = "auto"  # the engine may have started with dummy weights
    worker.reload_weights(weights_path=folder)
