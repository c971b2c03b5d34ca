"""Builds the vLLM engine of one rollout actor.

The actor owns the engine's step loop and hands each sample over as it finishes.
"""

from typing import TYPE_CHECKING, Any, Literal

import torch

from c2f_ray.engine import hardware_settings
from c2f_ray.recipe.schema import Policy, Rollout
from c2f_ray.weights.source import checksum
from c2f_ray.weights.transfer import transfer_backend

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

LoadFormat = Literal["dummy", "auto"]  # weights by a transfer, or from the model's folder


def build_engine(policy: Policy, rollout: Rollout, max_model_tokens: int, load_format: LoadFormat) -> "LLM":
    """An engine for prompt and response of `max_model_tokens` together, on the GPUs that this process sees."""
    from vllm import LLM
    from vllm.config import WeightTransferConfig

    gpus = rollout.gpus_per_actor
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
        **hardware_settings(gpus, rollout.memory, max(max_model_tokens, 8192)),
    )


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


def interrupt(llm: "LLM") -> "list[RequestOutput]":
    """Ends all requests; returns what each has so far. vLLM hands that over only through its asynchronous API."""
    from vllm.v1.engine import FinishReason

    engine: Any = llm.llm_engine
    states = list(engine.output_processor.request_states.values())
    outputs = [state.make_request_output([], None, FinishReason.ABORT, None, None, None) for state in states]
    engine.abort_request([output.request_id for output in outputs])
    return outputs


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
