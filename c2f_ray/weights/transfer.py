"""What a learner rank calls to bring its weights to the rollout engines.

Invariants: an engine that took part in a transfer has the sender's weights and their version, or has none and refuses
to generate; a transfer ends by its deadline, and its error names the actors that were waited for.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Literal

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from c2f_ray.errors import DeadlineError
from c2f_ray.recipe import Weights
from c2f_ray.weights.source import ModuleWeights

GRACE_S = 2.0  # after one engine failed: how long the others may take to show whether they did too


def transfer_backend(gpus_per_actor: int) -> Literal["nccl", "gloo"]:
    """The one place that decides: engines on GPUs receive over NCCL, engines on CPUs over gloo."""
    return "nccl" if gpus_per_actor else "gloo"


class WeightSender:
    """One on each learner rank; rank 0 sends. All ranks call `send` together, `connect` may be called on all.

    `actors` are handles of rollout actors, each an engine with tensor parallelism `max(1, gpus_per_actor)`. A second
    `connect` leaves the first group and joins a new one, for instance after an actor was replaced.
    """

    def __init__(self, source: ModuleWeights, weights: Weights, gpus_per_actor: int, rank: int) -> None:
        self.source = source
        self.weights = weights
        self.gpus_per_actor = gpus_per_actor
        self.rank = rank

    def connect(self, actors: list[Any]) -> None:
        """Joins all engines in one group of 1 + sum of their workers. Raises DeadlineError naming who did not come."""
        if self.rank != 0:
            return
        # Only the sending rank needs vllm, which takes seconds to import: before the deadline begins.
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_open_port

        from c2f_ray.weights.gloo import GlooTrainerInitInfo, register

        register()
        client = EngineClient(actors, self.source, max(1, self.gpus_per_actor), self.weights.timeout_s)
        settings: dict[str, Any] = {
            "rank": 0,
            "master_address": ray.util.get_node_ip_address(),
            "master_port": get_open_port(),
            "world_size": 1 + client.num_workers,
            "packed_buffer_size_bytes": self.weights.bucket_mib * 2**20,
        }
        if transfer_backend(self.gpus_per_actor) == "nccl":
            info = NCCLTrainerInitInfo(**settings)
        else:
            info = GlooTrainerInitInfo(**settings, timeout_s=self.weights.timeout_s)
        source: Any = self.source  # a WeightSource in all but name
        self.client = client
        self.engine = self._in_time(
            lambda: WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)
        )

    def send(self, version: int) -> None:
        """Sends the weights as they are now; engines then hold them as `version`.

        Raises DeadlineError, or WeightMismatchError when an engine ends with other weights than were sent.
        """
        if self.rank != 0:
            self.source.take_part()
            return
        self.client.version = version
        self._in_time(self.engine.send_weights)

    def _in_time(self, task: Callable[[], Any]) -> Any:
        """Runs `task` in a thread, because a broadcast whose peer died may never return."""
        result: Future[Any] = Future()
        device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None

        def run() -> None:
            try:
                if device is not None:  # a device is chosen for each thread
                    torch.accelerator.set_device_index(device)
                    torch.accelerator.synchronize()  # the last update's kernels
                result.set_result(task())
            except BaseException as error:
                result.set_exception(error)

        self.client.start_clock()
        threading.Thread(target=run, daemon=True).start()
        # The client's calls have the deadline, and know whom they waited for; they get the time to say so.
        wait([result, self.client.failed], self.weights.timeout_s + 2 * GRACE_S, FIRST_COMPLETED)
        if self.client.failed.done():
            return self.client.failed.result()
        if not result.done():
            raise DeadlineError(f"weight transfer: the sender did not finish in {self.weights.timeout_s:g} s")
        return result.result()


class EngineClient:
    """The four calls of vLLM's `VLLMWeightSyncClient`, to several engines that each have ranks of their own."""

    def __init__(self, actors: list[Any], source: ModuleWeights, workers_per_engine: int, timeout_s: float) -> None:
        self.actors = actors
        self.source = source
        self.workers_per_engine = workers_per_engine
        self.num_workers = len(actors) * workers_per_engine
        self.timeout_s = timeout_s
        self.version = -1  # of the transfer under way

    def start_clock(self) -> None:
        """Begins a transfer: its deadline counts from here."""
        self.began = time.monotonic()
        self.failed: Future[None] = Future()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        offsets = [init_info["rank_offset"] + i * self.workers_per_engine for i in range(len(self.actors))]
        refs = [
            actor.init_weight_transfer_engine.remote(init_info | {"rank_offset": offset})
            for actor, offset in zip(self.actors, offsets, strict=True)
        ]
        self._wait(refs, "joining the group")

    def start_weight_update(self) -> None:
        self._wait([actor.start_weight_update.remote() for actor in self.actors], "starting")

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        info = ray.put(update_info)  # a manifest of thousands of names, stored once for all engines
        self._wait([actor.update_weights.remote(info) for actor in self.actors], "receiving")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Gives the engines `self.version`: vLLM's senders leave `weight_version` out."""
        checksum = self.source.checksum()
        refs = [actor.finish_weight_update.remote(self.version, checksum) for actor in self.actors]
        self._wait(refs, "finishing")

    def _wait(self, refs: list[Any], phase: str) -> None:
        """Until all answered. The first failure ends it, since the others then wait for a peer that is gone."""
        waiting = refs
        while waiting:
            done, waiting = ray.wait(waiting, timeout=max(0.0, self.began + self.timeout_s - time.monotonic()))
            if not done or _failure(done[0]):
                error = self._diagnosis(refs, phase)
                self.failed.set_exception(error)
                raise error

    def _diagnosis(self, refs: list[Any], phase: str) -> Exception:
        answered, _ = ray.wait(refs, num_returns=len(refs), timeout=GRACE_S)
        lines = []
        for number, ref in enumerate(refs):
            failure = _failure(ref) if ref in answered else None
            if isinstance(failure, RayTaskError) and not isinstance(failure, DeadlineError):
                return failure  # the engine's own error says more than that it failed
            if ref not in answered:
                lines.append(f"rollout actor {number}: no answer after {time.monotonic() - self.began:.1f} s")
            elif isinstance(failure, RayTaskError):
                lines.append(f"rollout actor {number}: {failure.cause}")
            elif failure:
                lines.append(f"rollout actor {number}: the actor is dead")
        return DeadlineError(f"weight transfer, {phase} weights version {self.version}:\n" + "\n".join(lines))


def _failure(ref: Any) -> Exception | None:
    try:
        ray.get(ref)
    except (RayActorError, RayTaskError) as error:
        return error
    return None
