"""The sending side's stream of weights: Hugging Face names, full tensors, the engine's dtype.

Invariant: every learner rank walks the same layers in the same order, because under ZeRO-3 each gather is a
collective. The sending rank iterates; the others take part.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module, Parameter

from c2f_ray.adapters.deepspeed import full_shape

ADAPTED = ".base_layer."  # in PEFT's name of a weight that has an adapter
Gather = Callable[[list[Parameter]], AbstractContextManager[object]]


def no_gather(parameters: list[Parameter]) -> AbstractContextManager[None]:
    """For parameters that every rank holds whole: a plain module, or ZeRO stages 0 to 2."""
    return nullcontext()


class TensorInfo(NamedTuple):
    """One line of the manifest that both sides cut the stream by."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class ModuleWeights:
    """vLLM's `WeightSource` over a module, by duck typing: its `metadata` and a fresh iteration for each transfer.

    `gather` makes a list of parameters whole while its context is open; `deepspeed.zero.GatheredParameters` is one.
    One decoder layer is whole at a time. Tied parameters are sent once, under their first name. Names are the module's,
    which for dense models are the hub's; transformers 5 fuses a mixture's experts under names that vLLM refuses.
    Low-rank adapters are merged into the weights that they belong to: W + ``adapter_scale`` * B A.
    """

    def __init__(
        self, module: Module, dtype: torch.dtype, gather: Gather = no_gather, adapter_scale: float = 0.0
    ) -> None:
        self.module = module
        self.adapter_scale = adapter_scale
        self.dtype = dtype
        self.gather = gather
        self.sums: list[Tensor] = []

    def metadata(self) -> list[TensorInfo]:
        """Returns the manifest. Gathers nothing."""
        return [
            TensorInfo(_plain(name), self.dtype, full_shape(parameter))
            for name, parameter in self.module.named_parameters()
            if not is_adapter(name)
        ]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """(name, contiguous copy in the engine's dtype), with the checksum taken on the way."""
        return self.stream(copy=True)

    def stream(self, copy: bool) -> Iterator[tuple[str, Tensor]]:
        """As an iteration; without ``copy`` a tensor may be the module's own, and holds until the next is asked for."""
        self.sums = []
        for layer in self._layers():
            with self.gather([parameter for _, parameter in layer]):
                parameters = dict(layer)
                for name in (name for name, _ in layer if not is_adapter(name)):
                    tensor = self._merged(name, parameters, copy)
                    self.sums.append(_integer_sum(tensor))
                    yield _plain(name), tensor

    def _merged(self, name: str, layer: dict[str, Parameter], copy: bool) -> Tensor:
        """The layer's parameter, its adapter added in float32 if it has one, and rounded once."""
        module, _, kind = name.rpartition(ADAPTED)
        adapter = f"{module}.lora_A.default.{kind}"
        if adapter not in layer:
            return layer[name].detach().to(self.dtype, copy=copy, memory_format=torch.contiguous_format)
        a, b = layer[adapter].detach(), layer[f"{module}.lora_B.default.{kind}"].detach()
        return (layer[name].detach().float() + self.adapter_scale * (b.float() @ a.float())).to(self.dtype)

    def take_part(self) -> None:
        """A rank that does not send: opens and closes the gathers of one iteration."""
        for layer in self._layers():
            with self.gather([parameter for _, parameter in layer]):
                pass

    def checksum(self) -> int:
        """Of all that the last complete iteration yielded."""
        return _total(self.sums)

    def _layers(self) -> Iterator[list[tuple[str, Parameter]]]:
        for _, layer in groupby(self.module.named_parameters(), key=lambda item: _layer(item[0])):
            yield list(layer)


def is_adapter(name: str) -> bool:
    """Whether a parameter is PEFT's, not the model's own."""
    return ".lora_" in name


def _plain(name: str) -> str:
    """A parameter's name in the model without adapters."""
    return name.replace(ADAPTED, ".")


def checksum(tensors: Iterable[Tensor]) -> int:
    """The sum, modulo 2^64, of all elements' bits read as integers. Ours.

    It does not depend on the order, so fusing q, k and v into one tensor keeps it, and zero padding adds nothing.
    """
    return _total([_integer_sum(tensor) for tensor in tensors])


def _integer_sum(tensor: Tensor) -> Tensor:
    """int64 scalar on the tensor's device, so that nothing waits for the device while a transfer runs."""
    bits = tensor.detach().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
    if bits.device.type == "cpu":  # where torch's sum of small integers takes twenty times as long
        return torch.tensor(bits.numpy().sum(dtype=np.int64))
    return bits.sum(dtype=torch.int64)


def _total(sums: list[Tensor]) -> int:
    return int(torch.stack(sums).sum())


def _layer(name: str) -> str | None:
    """`model.layers.3.mlp.up_proj.weight` is of layer `model.layers.3`; embeddings and the head are of none."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else None
