"""The stream of weights that the sending rank sees, under a gather that works like ZeRO-3's."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from c2f_ray.weights.source import ModuleWeights, checksum


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 7, bias=False)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def test_a_partitioned_module_is_whole_one_layer_at_a_time(model):
    full = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    gathered = []

    @contextmanager
    def gather(parameters):
        gathered.append([names[parameter] for parameter in parameters])
        for parameter in parameters:
            parameter.data = full[names[parameter]].clone()
        yield
        for parameter in parameters:
            parameter.data.fill_(torch.nan)  # as if the memory were used again
            parameter.data = torch.empty(0)

    weights = ModuleWeights(model, torch.float32, gather)
    layers = [[f"layers.{i}.weight", f"layers.{i}.bias"] for i in range(3)]
    assert [(name, shape) for name, _, shape in weights.metadata()] == [(n, tuple(t.shape)) for n, t in full.items()]
    assert gathered == []

    sent = dict(weights)
    assert gathered == [["embed.weight"], *layers, ["head.weight"]]
    assert all(torch.equal(sent[name], full[name]) for name in full) and sent.keys() == full.keys()
    assert weights.checksum() == checksum(full.values())

    weights.take_part()
    assert gathered[5:] == gathered[:5]


def test_weights_are_sent_in_the_type_of_the_engine(model):
    sent = dict(ModuleWeights(model, torch.bfloat16))
    assert torch.equal(sent["head.weight"], model.head.weight.bfloat16())
    assert sent["head.weight"].dtype == torch.bfloat16


def test_tied_parameters_are_sent_once(model):
    model.head.weight = model.embed.weight
    names = [name for name, _ in ModuleWeights(model, torch.float32)]
    assert "embed.weight" in names and "head.weight" not in names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_checksum_sees_bits_and_not_places(dtype):
    q, k = torch.randn(3, 4).to(dtype), torch.randn(2, 4).to(dtype)
    padded = torch.cat([k, q, torch.zeros(5, 4, dtype=dtype)])
    assert checksum([q, k]) == checksum([padded])
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    padded.view(integer)[1, 2] ^= 1
    assert abs(checksum([padded]) - checksum([q, k])) == 1


def test_the_checksum_of_known_bits():
    # 1.0 is 0x3f800000, -2.0 is 0xc0000000, which as int32 is -2^30.
    assert checksum([torch.tensor([1.0]), torch.tensor([-2.0])]) == 0x3F800000 - 2**30
