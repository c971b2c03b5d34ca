"""What all vLLM engines have in common, those that generate and those that only score.

The engine core runs inside the actor. vllm is imported inside functions: it reads `engine_env` once, at import.
"""

import os
from typing import Any

import torch


def engine_env(gpus: int) -> dict[str, str]:
    """Environment of an engine's process, which must be set before vllm is imported there."""
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    }
    if gpus == 0:
        env["TORCH_COMPILE_DISABLE"] = "1"  # the first logprobs would otherwise call a C++ compiler
    return env


def hardware_settings(gpus: int, memory: float, max_batched_tokens: int) -> dict[str, Any]:
    """Arguments of `vllm.LLM`. `memory`: share of a GPU's, or GiB of KV cache on the CPU.

    `max_batched_tokens`: on the CPU no prompt may be longer.
    """
    if gpus:
        return {
            "tensor_parallel_size": gpus,
            "distributed_executor_backend": "uni" if gpus == 1 else "mp",
            "gpu_memory_utilization": memory,
        }
    _use_torch_linear()
    return {
        "distributed_executor_backend": "uni",
        "enforce_eager": True,
        "kv_cache_memory_bytes": int(memory * 2**30),
        # A seeded request cannot be prefilled in pieces on the CPU.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max_batched_tokens,
    }


def _use_torch_linear() -> None:
    """Keeps CPU linear layers as they were loaded.

    vLLM packs them for oneDNN and drops the weight, so that no checksum could see what the engine computes with.
    """
    from vllm.model_executor.layers import utils

    def dispatch(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = dispatch
