"""One rollout actor: a vLLM engine, token in and token out.

Invariants: an actor generates only with weights that have a version; the prefix cache never outlives the weights
that filled it; with the same weights, a request's tokens depend on nothing but its prompt, its seed and its limit; a
sample that goes on with other weights than it began with is prefilled anew by them.
"""

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError
from ray.experimental.internal_kv import _internal_kv_exists

from c2f_ray.data.trajectory import Ragged, Trajectories, TrajectoryInfo
from c2f_ray.errors import C2FError, WeightMismatchError
from c2f_ray.recipe.schema import Policy, Rollout
from c2f_ray.rollout.engine import (
    LoadFormat,
    abandon_update,
    build_engine,
    interrupt,
    parameters_checksum,
    reload_from,
    sampling_params,
)

NO_WEIGHTS = -1
LOOK_EVERY_S = 0.2  # whether to stop
INTERRUPTED = -1  # number of the shard with what was interrupted


@dataclass(frozen=True)
class Begun:
    """A sample that was interrupted, or waits for others of its prompt: where it is."""

    shard: Any  # reference to Trajectories
    row: int


@dataclass(frozen=True)
class RolloutRequest:
    sample_id: int  # unique within a step
    prompt_row: int
    seed: int  # in [0, 2^63)
    greedy: bool  # the most likely token at each position, whatever the recipe's temperature
    begun: Begun | None = None


@dataclass
class _Sample:
    """A response so far: token ids, logprobs and versions are of one length."""

    request: RolloutRequest
    tokens: list[int]
    logprobs: list[float]
    versions: list[int]
    finished: bool = False
    interrupted: bool = True  # until the engine says otherwise


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
        self, requests: list[RolloutRequest], max_tokens: int, ordered: bool, stop_key: str | None = None
    ) -> Iterator[Trajectories | TrajectoryInfo]:
        """Yields each shard's `Trajectories` and then, as an object of its own, its `TrajectoryInfo`.

        A shard is `rollout.shard_samples` trajectories (the last one fewer), handed over when all have finished.
        `ordered`: a shard holds consecutive requests; otherwise those that finished one after the other. Once
        `stop_key` is in Ray's key-value store, what is not finished is handed over as it is, in a shard of its own.
        """
        self._check(requests, max_tokens)
        engine: Any = self.llm.llm_engine
        samples = [self._begin(request) for request in requests]
        size = self.rollout.shard_samples
        shards: dict[int, list[int]] = defaultdict(list)  # positions that wait for others, by number of the shard
        done = 0
        running: set[int] = set()
        looked_at = time.monotonic()

        def hand_over(number: int) -> Iterator[Trajectories | TrajectoryInfo]:
            shard = self._shard([samples[position] for position in sorted(shards.pop(number))])
            yield shard
            yield shard.info

        def finish(position: int) -> Iterator[Trajectories | TrajectoryInfo]:
            nonlocal done
            number = INTERRUPTED if samples[position].interrupted else (position if ordered else done) // size
            done += 1
            shards[number].append(position)
            if number != INTERRUPTED and len(shards[number]) == size:
                yield from hand_over(number)

        try:
            for position, sample in enumerate(samples):
                if sample.interrupted and len(sample.tokens) < max_tokens:
                    engine.add_request(str(position), *self._rest_of(sample, max_tokens))
                    running.add(position)
            for position in sorted(set(range(len(samples))) - running):
                samples[position].interrupted = False
                yield from finish(position)
            while running:
                results = engine.step()
                if stop_key and time.monotonic() - looked_at > LOOK_EVERY_S:
                    looked_at = time.monotonic()
                    if _internal_kv_exists(stop_key):
                        results += interrupt(self.llm)
                for result in results:
                    position = int(result.request_id)
                    running.remove(position)
                    self._add(samples[position], result.outputs[0])
                    yield from finish(position)
            for number in sorted(shards):
                yield from hand_over(number)
        finally:  # the caller is gone, or the engine failed: leave nothing for the next call
            engine.abort_request([str(position) for position in running])

    def _begin(self, request: RolloutRequest) -> _Sample:
        """Where the request's sample is; at its start, too, where what there was of it is lost or cannot be fetched."""
        sample = _Sample(request, [], [], [])
        if request.begun is not None:
            try:
                shard: Trajectories = ray.get(request.begun.shard, timeout=self.rollout.timeout_s / 4)
            except (RayActorError, ObjectLostError, GetTimeoutError):  # the rest of the time is for sampling it anew
                return sample
            row = request.begun.row
            parts = (shard.response, shard.sampler_logprobs, shard.token_version)
            sample.tokens, sample.logprobs, sample.versions = (part[row].tolist() for part in parts)
            sample.finished = bool(shard.info.finished[row])
            sample.interrupted = bool(shard.info.interrupted[row])
        return sample

    def _rest_of(self, sample: _Sample, max_tokens: int) -> tuple[dict[str, list[int]], Any]:
        """Prompt and sampling parameters."""
        request, begun = sample.request, len(sample.tokens)
        seed = (request.seed + begun) % 2**63  # or it would draw the same numbers as for its first tokens
        params = sampling_params(self.rollout, seed, request.greedy, max_tokens - begun)
        return {"prompt_token_ids": self.prompt_tokens[request.prompt_row].tolist() + sample.tokens}, params

    def _add(self, sample: _Sample, output: Any) -> None:
        sample.tokens += output.token_ids
        sample.logprobs += output.logprobs.logprobs
        sample.versions += [self.weight_version] * len(output.token_ids)
        sample.finished = output.finish_reason == "stop"
        sample.interrupted = output.finish_reason == "abort"

    def _check(self, requests: list[RolloutRequest], max_tokens: int) -> None:
        if self.weight_version == NO_WEIGHTS:
            raise C2FError("this rollout actor has no weights: a transfer must come first, or come again if it failed")
        rows = np.array([request.prompt_row for request in requests])
        longest = int(self.prompt_tokens.lengths[rows].max())
        if longest + max_tokens > self.max_model_tokens:
            raise C2FError(
                f"a prompt of {longest} tokens and max_tokens {max_tokens} exceed the engine's {self.max_model_tokens}"
            )

    def _shard(self, samples: list[_Sample]) -> Trajectories:
        requests = [sample.request for sample in samples]
        prompt = self.prompt_tokens.select([request.prompt_row for request in requests])
        response = Ragged.from_rows([sample.tokens for sample in samples], np.int32)
        info = TrajectoryInfo(
            sample_id=np.array([request.sample_id for request in requests], np.int64),
            prompt_row=np.array([request.prompt_row for request in requests], np.int64),
            greedy=np.array([request.greedy for request in requests], np.bool_),
            finished=np.array([sample.finished for sample in samples], np.bool_),
            interrupted=np.array([sample.interrupted for sample in samples], np.bool_),
            prompt_tokens=prompt.lengths.astype(np.int32),
            response_tokens=response.lengths.astype(np.int32),
            weight_version=np.array([(*sample.versions, self.weight_version)[0] for sample in samples], np.int32),
        )
        logprobs = Ragged.from_rows([sample.logprobs for sample in samples], np.float32)
        versions = Ragged.from_rows([sample.versions for sample in samples], np.int32)
        return Trajectories(info, prompt, response, logprobs, versions)

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
