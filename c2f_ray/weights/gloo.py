"""The `gloo` backend of vLLM's weight transfer: engines on CPUs get weights by the code path of engines on GPUs.

vLLM loads `register` in each of its processes, through the entry-point group `vllm.general_plugins`.
Invariants: both sides cut the manifest into the same buckets, so that the n-th broadcast means the same tensors; while
one bucket is on its way the sender gathers and packs the next, and engines load the one before.
"""

import math
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache
from itertools import cycle
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, TCPStore
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from c2f_ray.adapters.torch import gloo_group
from c2f_ray.errors import DeadlineError, WeightMismatchError
from c2f_ray.runtime.rendezvous import open_store


@cache
def register() -> None:
    """Registers both halves with vLLM, once in a process however often it is called."""
    WeightTransferEngineFactory.register_engine("gloo", GlooReceiver)
    WeightTransferTrainerFactory.register_engine("gloo", GlooSender)


@dataclass(kw_only=True)
class GlooInitInfo(WeightTransferInitInfo):
    """What an engine must know to join; the fields that it shares with vLLM's NCCL backend have its names."""

    master_address: str
    master_port: int
    rank_offset: int  # rank of the engine's first worker; the sender is rank 0
    world_size: int
    packed_buffer_size_bytes: int
    timeout_s: float


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    backend: ClassVar[str] = "gloo"

    master_address: str
    master_port: int
    world_size: int
    packed_buffer_size_bytes: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """The manifest, in the wire form of vLLM's NCCL backend."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]

    def manifest(self) -> list[ParamMeta]:
        return [
            ParamMeta(name, getattr(torch, dtype), tuple(shape))
            for name, dtype, shape in zip(self.names, self.dtype_names, self.shapes, strict=True)
        ]


class GlooReceiver(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """The half in each vLLM worker: receives buckets and loads them layer by layer."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        self.info = init_info
        rank = init_info.rank_offset + self.parallel_config.rank
        self.group = _join(init_info, rank)

    def start_weight_update(self) -> None:
        # Read before the reload takes tied parameters apart: of those only the first is sent.
        self.expected = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict) -> None:
        """Replaces the base's method, which ends by synchronising an accelerator."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Raises DeadlineError when the sender falls silent, WeightMismatchError when weights did not arrive."""
        deadline = time.monotonic() + self.info.timeout_s
        model: Any = self.model
        loaded: set[str] = set()
        buckets = list(_buckets(update_info.manifest(), self.info.packed_buffer_size_bytes))
        coming = self._receive(buckets, 0, deadline)
        for number, bucket in enumerate(buckets):
            parts = coming().split([_bytes(tensor) for tensor in bucket])
            if number + 1 < len(buckets):
                coming = self._receive(buckets, number + 1, deadline)
            loaded |= model.load_weights(
                (tensor.name, part.view(tensor.dtype).view(tensor.shape))
                for tensor, part in zip(bucket, parts, strict=True)
            )
        if missing := sorted(self.expected - loaded):
            raise WeightMismatchError(f"the learner's model has no weights for the engine's {', '.join(missing)}")

    def _receive(self, buckets: list[list[ParamMeta]], number: int, deadline: float) -> Callable[[], Tensor]:
        # A new buffer each time: a fused layer keeps its parts until the last one comes, perhaps two buckets on.
        buffer = torch.empty(sum(map(_bytes, buckets[number])), dtype=torch.uint8)
        what = f"bucket {number + 1} of {len(buckets)} from {self.info.master_address}:{self.info.master_port}"
        return _begin_broadcast(self.group, buffer, deadline, what)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        self.group = None


class GlooSender(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """The half in the sending learner rank."""

    init_info_cls = GlooTrainerInitInfo

    def __init__(self, info: GlooTrainerInitInfo, client: VLLMWeightSyncClient, source: WeightSource) -> None:
        super().__init__(client=client, source=source, is_sender=True)
        self.info = info
        self.weights: Any = source
        self.manifest = source.metadata()
        self.buckets = list(_buckets(self.manifest, info.packed_buffer_size_bytes))
        size = max(sum(map(_bytes, bucket)) for bucket in self.buckets)
        # One is sent as the other is filled. Fresh memory for each transfer would cost more than filling it.
        self.buffers = [torch.empty(size, dtype=torch.uint8) for _ in range(2)]
        engines = GlooInitInfo(
            master_address=info.master_address,
            master_port=info.master_port,
            rank_offset=1,
            world_size=info.world_size,
            packed_buffer_size_bytes=info.packed_buffer_size_bytes,
            timeout_s=info.timeout_s,
        )
        with ThreadPoolExecutor(1) as pool:  # all ranks must enter the rendezvous together
            joined = pool.submit(client.init_weight_transfer_engine, asdict(engines))
            self.group = _join(info, rank=0)
            joined.result()

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        assert source is not None
        return cls(init_info, client, source)

    def send_weights(self) -> None:
        update_info = GlooUpdateInfo(
            names=[tensor.name for tensor in self.manifest],
            dtype_names=[str(tensor.dtype).removeprefix("torch.") for tensor in self.manifest],
            shapes=[list(tensor.shape) for tensor in self.manifest],
        )
        self.client.start_weight_update()
        pool = ThreadPoolExecutor(1)
        received = pool.submit(self.client.update_weights, asdict(update_info))
        pool.shutdown(wait=False)
        try:
            self._broadcast_all()
        except DeadlineError:
            received.result()  # the client knows which engine was lost, and raises that
            raise
        received.result()
        self.client.finish_weight_update()

    def _broadcast_all(self) -> None:
        deadline = time.monotonic() + self.info.timeout_s
        stream = self.weights.stream(copy=False)
        sent: Callable[[], Tensor] | None = None
        for bucket, buffer in zip(self.buckets, cycle(self.buffers), strict=False):
            packed = 0
            for expected, (name, tensor) in zip(bucket, stream, strict=False):
                if (name, tensor.dtype, tuple(tensor.shape)) != (expected.name, expected.dtype, expected.shape):
                    raise WeightMismatchError(f"the manifest says {expected}, the source gave {name} {tensor.shape}")
                buffer[packed : packed + tensor.nbytes].copy_(tensor.reshape(-1).view(torch.uint8))
                packed += tensor.nbytes
            if sent is not None:
                sent()
            what = f"the engines to take {len(bucket)} tensors from {bucket[0].name}"
            sent = _begin_broadcast(self.group, buffer[:packed], deadline, what)
        if sent is not None:
            sent()
        if (extra := next(stream, None)) is not None:  # also lets the source leave its last layer
            raise WeightMismatchError(f"the source gave {extra[0]}, which is not in the manifest")


def _join(info: GlooInitInfo | GlooTrainerInitInfo, rank: int) -> Any:
    """The group of the sender and all engines. gloo listens on the interface that leads to the sender's store."""
    timeout = timedelta(seconds=info.timeout_s)
    with _gloo_errors(f"the group of {info.world_size} at {info.master_address}:{info.master_port}"):
        if rank == 0:
            store = open_store(info.master_address, info.master_port, info.timeout_s)
        else:
            store = TCPStore(info.master_address, info.master_port, is_master=False, timeout=timeout)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((info.master_address, info.master_port))
            address = probe.getsockname()[0]
        return gloo_group(store, rank, info.world_size, address, info.timeout_s)


def _begin_broadcast(group: Any, buffer: Tensor, deadline: float, what: str) -> Callable[[], Tensor]:
    """From rank 0, in place. What it returns waits until the buffer has been sent, or is full, and returns it."""
    options = BroadcastOptions()
    options.rootRank = 0
    options.timeout = timedelta(seconds=max(0.001, deadline - time.monotonic()))
    with _gloo_errors(what):
        work = group.broadcast([buffer], options)

    def finish() -> Tensor:
        with _gloo_errors(what):
            work.wait()
        return buffer

    return finish


@contextmanager
def _gloo_errors(what: str) -> Iterator[None]:
    """gloo raises a plain RuntimeError, for a timeout as for a peer whose connection closed."""
    try:
        yield
    except RuntimeError as error:
        raise DeadlineError(f"weight transfer: waited for {what}: {error}") from error


def _buckets(manifest: list[ParamMeta], bucket_bytes: int) -> Iterator[list[ParamMeta]]:
    """Consecutive tensors of at most `bucket_bytes` together; a larger tensor travels alone."""
    bucket: list[ParamMeta] = []
    size = 0
    for tensor in manifest:
        if bucket and size + _bytes(tensor) > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += _bytes(tensor)
    if bucket:
        yield bucket


def _bytes(tensor: ParamMeta) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize
