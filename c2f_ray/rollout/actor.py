"""One rollout actor: a vLLM engine, token in and token out.

Invariants: an actor generates only with weights that have a version; the prefix cache never outlives the weights
that filled it; with the same weights, a request's tokens depend on nothing but its prompt, its seed and its limit.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from c2f_ray.data.trajectory import Ragged, Trajectories, TrajectoryInfo
from c2f_ray.errors import C2FError, WeightMismatchError
from c2f_ray.recipe.schema import Policy, Rollout
from c2f_ray.rollout.engine import (
    LoadFormat,
    abandon_update,
    build_engine,
    parameters_checksum,
    reload_from,
    sampling_params,
)

NO_WEIGHTS = -1


@dataclass(frozen=True)
class RolloutRequest:
    sample_id: int  # unique within a step
    prompt_row: int
    seed: int  # in [0, 2^63)
    greedy: bool  # the most likely token at each position, whatever the recipe's temperature


class RolloutActor:
    """`prompt_tokens` holds the int32 ids of all prompts; requests name rows of it."""

    def __init__(
        self, policy: Policy, rollout: Rollout, prompt_tokens: Ragged, max_model_tokens: int, load_format: LoadFormat
    ) -> None:
        self.rollout = rollout
        self.prompt_tokens = prompt_tokens
        self.max_model_tokens = max_model_tokens
        self.llm = build_engine(policy, rollout, max_model_tokens, load_format)
        self.weight_version = NO_WEIGHTS if load_format == "dummy" else 0
        self.transfer_open = False  # begun and not finished

    def ready(self) -> str:
        """Answers once the engine is built: where it runs."""
        return f"{ray.util.get_node_ip_address()}, process {os.getpid()}"

    @ray.method(num_returns="streaming")
    def generate(
        self, requests: list[RolloutRequest], max_tokens: int, ordered: bool
    ) -> Iterator[Trajectories | TrajectoryInfo]:
        """Yields each shard's `Trajectories` and then, as an object of its own, its `TrajectoryInfo`.

        A shard is `rollout.shard_samples` trajectories (the last one fewer), handed over when all have finished.
        `ordered`: a shard holds consecutive requests; otherwise those that finished one after the other.
        """
        self._check(requests, max_tokens)
        engine: Any = self.llm.llm_engine
        outputs: dict[int, Any] = {}
        shards: dict[int, list[int]] = defaultdict(list)  # positions, by number of the shard
        size = self.rollout.shard_samples
        try:
            for position, request in enumerate(requests):
                prompt = {"prompt_token_ids": self.prompt_tokens[request.prompt_row].tolist()}
                params = sampling_params(self.rollout, request.seed, request.greedy, max_tokens)
                engine.add_request(str(position), prompt, params)
            while engine.has_unfinished_requests():
                for result in engine.step():
                    position = int(result.request_id)
                    number = (position if ordered else len(outputs)) // size
                    outputs[position] = result.outputs[0]
                    shards[number].append(position)
                    if len(shards[number]) == min(size, len(requests) - number * size):
                        positions = sorted(shards[number])
                        shard = self._shard([(requests[i], outputs[i]) for i in positions])
                        yield shard
                        yield shard.info
        finally:  # the caller is gone, or the engine failed: leave nothing for the next call
            engine.abort_request([str(i) for i in range(len(requests)) if i not in outputs])

    def _check(self, requests: list[RolloutRequest], max_tokens: int) -> None:
        if self.weight_version == NO_WEIGHTS:
            raise C2FError("this rollout actor has no weights: a transfer must come first, or come again if it failed")
        rows = np.array([request.prompt_row for request in requests])
        longest = int(self.prompt_tokens.lengths[rows].max())
        if longest + max_tokens > self.max_model_tokens:
            raise C2FError(
                f"a prompt of {longest} tokens and max_tokens {max_tokens} exceed the engine's {self.max_model_tokens}"
            )

    def _shard(self, samples: list[tuple[RolloutRequest, Any]]) -> Trajectories:
        requests = [request for request, _ in samples]
        outputs = [output for _, output in samples]
        prompt = self.prompt_tokens.select([request.prompt_row for request in requests])
        response = Ragged.from_rows([output.token_ids for output in outputs], np.int32)
        info = TrajectoryInfo(
            sample_id=np.array([request.sample_id for request in requests], np.int64),
            prompt_row=np.array([request.prompt_row for request in requests], np.int64),
            greedy=np.array([request.greedy for request in requests], np.bool_),
            finished=np.array([output.finish_reason == "stop" for output in outputs], np.bool_),
            prompt_tokens=prompt.lengths.astype(np.int32),
            response_tokens=response.lengths.astype(np.int32),
            weight_version=np.full(len(samples), self.weight_version, np.int32),
        )
        logprobs = Ragged.from_rows([output.logprobs.logprobs for output in outputs], np.float32)
        return Trajectories(info, prompt, response, logprobs)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        if self.transfer_open:  # the last transfer failed; a new group comes for a new one
            self.llm.collective_rpc(abandon_update)
            self.transfer_open = False
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self.weight_version = NO_WEIGHTS  # from here to the end of the transfer the weights are neither old nor new
        self.transfer_open = True
        self.llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, version: int, checksum: int) -> None:
        """`checksum` is the sender's; it can be compared where one worker holds all of the weights."""
        self.llm.finish_weight_update()
        self.transfer_open = False
        self.reset_prefix_cache()
        own = self.weights_checksum()
        if len(own) == 1 and own[0] != checksum:
            raise WeightMismatchError(
                f"transfer {version}: this engine's checksum is {own[0]}, the sender's {checksum}"
            )
        self.weight_version = version

    def reset_prefix_cache(self) -> None:
        """vLLM keeps the blocks that the old weights filled, and would go on from them."""
        if not self.llm.reset_prefix_cache():
            raise C2FError("vLLM did not clear its prefix cache: requests are still running")

    def weights_checksum(self) -> list[int]:
        """One for each worker of the engine, over its share of the parameters."""
        return self.llm.apply_model(parameters_checksum)

    def load_folder(self, folder: str, prompt_tokens: Ragged) -> None:
        """Takes the weights of another model folder of the same architecture, as version 0, and prompts for it."""
        self.weight_version = NO_WEIGHTS
        self.prompt_tokens = prompt_tokens
        self.llm.collective_rpc(reload_from, args=(folder,))
        self.reset_prefix_cache()
        self.weight_version = 0
