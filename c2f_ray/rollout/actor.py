"""One rollout actor: a vLLM engine, token ids in and token ids out.

Invariants: an actor generates only with weights that have a version; the prefix cache never outlives the weights
that filled it; with the same weights, a request's tokens depend only on its prompt, its seed and its limit; a sample
that resumes with other weights is prefilled again by them.

Ray runs the methods of the default concurrency group in one thread, which is not the constructor's, and `interrupt` in
another. vLLM and torch keep settings per thread, so `ready` builds the engine, in the thread that will use it.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError

from c2f_ray.adapters.vllm import (
    Completion,
    Requests,
    abandon_update,
    build_llm,
    reload_from,
    weight_transfer_config,
)
from c2f_ray.data.trajectory import Ragged, Trajectories, TrajectoryInfo
from c2f_ray.errors import C2FError, WeightMismatchError
from c2f_ray.recipe import Policy, Rollout
from c2f_ray.weights.source import checksum
from c2f_ray.weights.transfer import transfer_backend

LoadFormat = Literal["dummy", "auto"]  # weights by a transfer, or from the model's folder

NO_WEIGHTS = -1
INTERRUPTED = -1  # number of the shard of interrupted samples
CONCURRENCY_GROUPS = {"control": 1}  # Ray's option: a call in this group runs while the engine generates


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
    """`prompt_tokens` holds the int32 ids of all prompts; requests name rows of it.

    It must be started with `CONCURRENCY_GROUPS`.
    """

    def __init__(
        self, policy: Policy, rollout: Rollout, prompt_tokens: Ragged, max_model_tokens: int, load_format: LoadFormat
    ) -> None:
        self.policy = policy
        self.rollout = rollout
        self.prompt_tokens = prompt_tokens
        self.max_model_tokens = max_model_tokens
        self.load_format = load_format
        self.llm: Any = None  # vllm.LLM, from `ready` on
        self.interrupted_call = 0  # the last one that was interrupted; calls are numbered from 1
        self.weight_version = NO_WEIGHTS if load_format == "dummy" else 0
        self.transfer_open = False  # begun and not finished

    def ready(self) -> str:
        """Builds the engine, unless it is there. Returns the node's address and the process."""
        if self.llm is None:
            gpus = self.rollout.gpus_per_actor
            self.llm = build_llm(
                self.policy.model,
                gpus,
                self.rollout.memory,
                max(self.max_model_tokens, 8192),
                dtype=self.policy.dtype,
                load_format=self.load_format,
                max_model_len=self.max_model_tokens,
                max_num_seqs=self.rollout.max_num_seqs,
                enable_prefix_caching=True,
                weight_transfer_config=weight_transfer_config(transfer_backend(gpus)),
            )
        return f"{ray.util.get_node_ip_address()}, process {os.getpid()}"

    @ray.method(concurrency_group="control")
    def interrupt(self, call: int) -> None:
        """Ends the `generate` of this number, begun or not, and those of lower numbers."""
        self.interrupted_call = max(self.interrupted_call, call)

    @ray.method(num_returns="streaming")
    def generate(
        self, requests: list[RolloutRequest], max_tokens: int, ordered: bool, call: int | None = None
    ) -> Iterator[Trajectories | TrajectoryInfo]:
        """Yields each shard's `Trajectories` and then, as an object of its own, its `TrajectoryInfo`.

        A shard has `rollout.shard_samples` trajectories (the last one fewer), and is yielded when all have finished.
        `ordered`: a shard has consecutive requests; otherwise they are in the order in which they finished. Once
        `interrupt` was called with `call` or a higher number, the unfinished samples are yielded as a shard of their
        own.
        """
        self._check(requests, max_tokens)
        samples = [self._begin(request) for request in requests]
        size = self.rollout.shard_samples
        shards: dict[int, list[int]] = defaultdict(list)  # positions that wait for others, by number of the shard
        done = 0
        engine = Requests(self.llm, interruptible=call is not None)

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
                    self._add_request(engine, position, max_tokens, sample)
            for position in sorted(set(range(len(samples))) - set(engine.running)):
                samples[position].interrupted = False
                yield from finish(position)
            while engine.running:
                completions = engine.step()
                if call is not None and call <= self.interrupted_call:
                    completions += engine.interrupt()
                for completion in completions:
                    self._append(samples[completion.number], completion)
                    yield from finish(completion.number)
            for number in sorted(shards):
                yield from hand_over(number)
        finally:  # the caller is gone, or the engine failed: leave nothing for the next call
            engine.abort()

    def _begin(self, request: RolloutRequest) -> _Sample:
        """Restores a partial sample; starts over if it cannot be fetched."""
        sample = _Sample(request, [], [], [])
        if request.begun is not None:
            try:
                shard: Trajectories = ray.get(request.begun.shard, timeout=self.rollout.timeout_s / 4)
            except (RayActorError, ObjectLostError, GetTimeoutError):  # the rest of the time is for sampling it again
                return sample
            row = request.begun.row
            parts = (shard.response, shard.sampler_logprobs, shard.token_version)
            sample.tokens, sample.logprobs, sample.versions = (part[row].tolist() for part in parts)
            sample.finished = bool(shard.info.finished[row])
            sample.interrupted = bool(shard.info.interrupted[row])
        return sample

    def _add_request(self, engine: Requests, number: int, max_tokens: int, sample: _Sample) -> None:
        """Asks the engine for the rest of a sample."""
        request, done = sample.request, len(sample.tokens)
        engine.add(
            number,
            self.prompt_tokens[request.prompt_row].tolist() + sample.tokens,
            max_tokens - done,
            temperature=0.0 if request.greedy else self.rollout.temperature,
            top_p=1.0 if request.greedy else self.rollout.top_p,
            seed=(request.seed + done) % 2**63,  # or it would draw the same numbers as for its first tokens
        )

    def _append(self, sample: _Sample, completion: Completion) -> None:
        sample.tokens += completion.tokens
        sample.logprobs += completion.logprobs
        sample.versions += [self.weight_version] * len(completion.tokens)
        sample.finished = completion.reason == "stop"
        sample.interrupted = completion.reason == "abort"

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
        """Ends a transfer. Raises WeightMismatchError if `checksum`, the sender's, is not the engine's own.

        They can be compared if one worker has all of the weights.
        """
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
        """Drops the cached blocks of the old weights, which vLLM would reuse. Raises C2FError if vLLM refuses."""
        if not self.llm.reset_prefix_cache():
            raise C2FError("vLLM did not clear its prefix cache: requests are still running")

    def weights_checksum(self) -> list[int]:
        """Returns one checksum for each worker of the engine, over its share of the parameters."""
        return self.llm.apply_model(_parameters_checksum)

    def load_folder(self, folder: str, prompt_tokens: Ragged) -> None:
        """Loads the weights of another model folder of the same architecture, as version 0, and its prompts."""
        self.weight_version = NO_WEIGHTS
        self.prompt_tokens = prompt_tokens
        self.llm.collective_rpc(reload_from, args=(folder,))
        self.reset_prefix_cache()
        self.weight_version = 0


def _parameters_checksum(model: torch.nn.Module) -> int:
    """For `LLM.apply_model`: the checksum of a worker's parameters (buffers, such as rotary tables, are not sent)."""
    return checksum(model.parameters())
