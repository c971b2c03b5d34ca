"""vLLM 0.32: engines that run inside the calling process, token ids in and token ids out.

`LLM`, `LLMEngine.add_request`, `step` and `abort_request` are public. Private here: the flag of an open weight update,
and the choice of the matrix product on CPUs. vllm is imported inside functions: it reads `engine_env` once, at import.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm import LLM


def engine_env(gpus: int) -> dict[str, str]:
    """Returns the environment of an engine's process, which must be set before vllm is imported there."""
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    }
    if gpus == 0:
        env["TORCH_COMPILE_DISABLE"] = "1"  # the first logprobs would otherwise call a C++ compiler
    return env


def build_llm(model: str, gpus: int, memory: float, max_batched_tokens: int, **settings: Any) -> "LLM":
    """Builds an engine on the GPUs that this process sees, or on the CPU.

    Args:
        model: a folder, or a name on the hub.
        gpus: tensor parallelism; 0 is the CPU.
        memory: share of each GPU's memory, or GiB of KV cache on the CPU.
        max_batched_tokens: the longest prompt on the CPU, where no prompt is prefilled in pieces.
        settings: further arguments of `vllm.LLM`.
    """
    from vllm import LLM

    if gpus:
        settings |= {
            "tensor_parallel_size": gpus,
            "distributed_executor_backend": "uni" if gpus == 1 else "mp",
            "gpu_memory_utilization": memory,
        }
    else:
        _use_torch_linear()
        settings |= {
            "distributed_executor_backend": "uni",
            "enforce_eager": True,
            "kv_cache_memory_bytes": int(memory * 2**30),
            # A seeded request cannot be prefilled in pieces on the CPU.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max_batched_tokens,
        }
    return LLM(model, seed=0, disable_log_stats=True, use_tqdm_on_load=False, **settings)


def _use_torch_linear() -> None:
    """Keeps the weights of CPU linear layers as they were loaded.

    vLLM packs them for oneDNN and drops the original, so no checksum could tell what the engine computes with.
    """
    from vllm.model_executor.layers import utils

    def dispatch(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = dispatch


@dataclass(frozen=True)
class Completion:
    """What a request has generated: token ids and their logprobs before temperature and top_p, of one length."""

    number: int
    tokens: list[int]
    logprobs: list[float]
    reason: str | None  # "stop", "length", or "abort" when it was interrupted


class Requests:
    """The requests of one call, stepped by the caller.

    Only with `interruptible` does vLLM hand over what unfinished requests have so far, after each step.
    """

    def __init__(self, llm: "LLM", *, interruptible: bool) -> None:
        from vllm.sampling_params import RequestOutputKind

        self.engine: Any = llm.llm_engine
        self.kind = RequestOutputKind.CUMULATIVE if interruptible else RequestOutputKind.FINAL_ONLY
        self.running: dict[int, Any] = {}  # by number: the last output, None before the first

    def add(self, number: int, prompt: list[int], max_tokens: int, **sampling: Any) -> None:
        """Adds a request for one response to the token ids `prompt`; `sampling` as in `vllm.SamplingParams`."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=max_tokens, logprobs=0, flat_logprobs=True, detokenize=False, output_kind=self.kind, **sampling
        )
        self.engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
        self.running[number] = None

    def step(self) -> list[Completion]:
        """Generates at most one token for each request; returns the requests that it finished."""
        finished = []
        for output in self.engine.step():
            number = int(output.request_id)
            self.running[number] = output.outputs[0]
            if output.finished:
                finished.append(_completion(number, self.running.pop(number)))
        return finished

    def interrupt(self) -> list[Completion]:
        """Ends all requests; returns what each has so far, perhaps nothing."""
        parts = [_completion(number, output) for number, output in self.running.items()]
        self.abort()
        return parts

    def abort(self) -> None:
        """Ends all requests."""
        self.engine.abort_request([str(number) for number in self.running])
        self.running.clear()


def _completion(number: int, output: Any) -> Completion:
    if output is None:
        return Completion(number, [], [], "abort")
    return Completion(number, list(output.token_ids), list(output.logprobs.logprobs), output.finish_reason or "abort")


def prompt_logprobs(llm: "LLM", prompts: list[list[int]]) -> list[list[float]]:
    """Returns the logprob of each token of each prompt, in nats, but not of the first one, which has none."""
    from vllm import SamplingParams

    # An engine generates one token at least.
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False)
    inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs: list[Any] = llm.generate(inputs, params, use_tqdm=False)
    return [output.prompt_logprobs.logprobs for output in outputs]


def weight_transfer_config(backend: str) -> Any:
    """Returns the setting of `build_llm` for engines that receive weights."""
    from vllm.config import WeightTransferConfig

    return WeightTransferConfig(backend=backend)  # pyrefly: ignore (a registered backend has any name)


def abandon_update(worker: Any) -> None:
    """For `LLM.collective_rpc`: ends a failed transfer, so that the next one finds no half-loaded layer."""
    worker.worker._weight_update_active = False  # its value depends on where the transfer stopped
    worker.start_weight_update()
    worker.finish_weight_update()


def reload_from(worker: Any, folder: str) -> None:
    """For `LLM.collective_rpc`: loads the weights of another folder of the same architecture in place."""
    worker.vllm_config.load_config.load_format = "auto"  # the engine may have started with dummy weights
    worker.reload_weights(weights_path=folder)
