"""Low-rank adapters on real DeepSpeed ranks, against plain PEFT and torch, and the folders that are exported."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_learner import (
    SMALL,
    UPDATES,
    batch,
    clipped_gradients,
    distance,
    plain_updates,
    recipe,
    save_policy,
    shards,
    trajectories,
)
from transformers import AutoModelForCausalLM

from c2f_ray.algorithms.remax import ReMax
from c2f_ray.learner.group import LearnerGroup

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the ranks cannot import this file
LORA = {"rank": 4, "alpha": 6.0, "targets": ["q_proj", "layers.1.mlp.up_proj", "lm_head"]}
TARGETS = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)]
TARGETS += ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module", params=[2, 3], ids=["zero2", "zero3"])
def run(request, cluster, policy, tmp_path_factory) -> SimpleNamespace:
    """UPDATES updates by two ranks, exported before and after them."""
    folder = tmp_path_factory.mktemp("run")
    group = LearnerGroup(
        recipe(policy, ranks=2, zero_stage=request.param, tokens_per_microbatch=SMALL, lora=LORA), ReMax, 3
    )
    group.wait_until_ready()
    group.export(folder / "start", "{{ messages }}")
    run = SimpleNamespace(folder=folder, metrics=[])
    for update in range(UPDATES):
        run.metrics.append(group.update(shards(trajectories(update)), batch(update)))
        if update == 0:
            run.gradients = ray.get([rank.__ray_call__.remote(gradients_of_adapters) for rank in group.ranks])[0]
    run.stream = ray.get([rank.__ray_call__.remote(stream) for rank in group.ranks])[0]
    group.export(folder / "coarse", "{{ messages }}")
    (folder / "checkpoint").mkdir()
    group.save(folder / "checkpoint")
    group.update(shards(trajectories(2)), batch(2))
    group.export(folder / "after", "{{ messages }}")
    group.load(folder / "checkpoint")
    group.export(folder / "back", "{{ messages }}")
    group.close()
    return run


def gradients_of_adapters(rank) -> dict:
    for name, parameter in rank.policy.module.model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name)
    return clipped_gradients(rank)


def stream(rank) -> dict:
    """What the engines get."""
    return dict(rank._weights())


def test_updates_equal_plain_peft(run, policy):
    plain = plain_updates(policy, torch.float64, run.folder / "start_adapter")
    prefix = "base_model.model."
    assert {prefix + name for name in run.gradients} == plain.gradients.keys()
    # Float32 against float64; at first B is zero, so A has no gradient.
    gradients = {prefix + name: gradient for name, gradient in run.gradients.items()}
    assert distance(gradients, plain.gradients) < 3e-6
    assert distance(load_file(run.folder / "coarse" / "model.safetensors"), plain.weights) < 1e-7
    for update, metrics in enumerate(run.metrics):
        assert metrics["learner/loss"] == pytest.approx(plain.loss[update], rel=2e-6)
        assert metrics["learner/grad_norm"] == pytest.approx(plain.norm[update], rel=2e-6)
        assert metrics["kl/sequence"] == pytest.approx(plain.kl[update], rel=2e-3, abs=1e-6)
    assert abs(plain.kl[1]) > 1e-4


def test_only_targets_change_and_engines_get_them_merged(run, policy):
    before = load_file(policy / "model.safetensors")
    start, coarse = (load_file(run.folder / name / "model.safetensors") for name in ("start", "coarse"))
    assert start.keys() == coarse.keys() == run.stream.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(start[name], tensor)  # adapters begin with no effect
        assert torch.equal(coarse[name], tensor) == (name not in TARGETS), name
        assert torch.equal(run.stream[name], coarse[name])
    adapter = load_file(run.folder / "coarse_adapter" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
    torch.testing.assert_close(coarse[f"{name}.weight"] - before[f"{name}.weight"], 1.5 * b @ a, rtol=0, atol=1e-7)


def test_peft_loads_the_exported_adapter(run, policy):
    adapter = run.folder / "coarse_adapter"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(policy)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy), adapter)(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(run.folder / "coarse")(ids).logits
        torch.testing.assert_close(peft, merged, rtol=0, atol=1e-5)
        assert (merged - AutoModelForCausalLM.from_pretrained(policy)(ids).logits).abs().max() > 1e-4


def test_a_checkpoint_brings_the_adapters_back(run):
    for file in ("coarse/model.safetensors", "coarse_adapter/adapter_model.safetensors"):
        coarse, after, back = (
            (run.folder / file.replace("coarse", name)).read_bytes() for name in ("coarse", "after", "back")
        )
        assert back == coarse != after


def test_a_checkpoint_holds_the_adapters_alone(run):
    sizes = {}
    for file in (run.folder / "checkpoint").glob("policy-rank*.safetensors"):
        for name, tensor in load_file(file).items():
            sizes[name] = sizes.get(name, 0) + tensor.numel()
    kinds = [name.partition("/")[0] for name in sizes]
    assert sorted(kinds) == sorted(["weight", "exp_avg", "exp_avg_sq"] * 10)  # A and B of 5 targets
    assert all(".lora_" in name for name in sizes)
    # q_proj three times (64 to 64), up_proj (64 to 128) and lm_head (64 to 64), rank 4; weight and two moments of each.
    assert sum(sizes.values()) == 3 * 4 * (4 * (64 + 64) + 64 + 128)
