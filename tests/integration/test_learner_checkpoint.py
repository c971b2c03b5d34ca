"""The learner's checkpoints with real DeepSpeed ranks: any number of ranks and any ZeRO stage opens them."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from test_learner import distance, recipe, save_policy, shards, trajectories
from test_ppo import COMMON, IN_LOSS, batch, state_of_optimizers

from c2f_ray.algorithms.registry import algorithm_of
from c2f_ray.learner.group import LearnerGroup
from c2f_ray.recipe import Recipe

for name in (__name__, "test_ppo", "test_learner"):
    ray.cloudpickle.register_pickle_by_value(sys.modules[name])  # the ranks cannot import these files


def ppo(policy: Path, dtype: str = "float32", **learner) -> Recipe:
    remax = recipe(policy)
    optimizer = remax.learner.optimizer.model_dump()
    settings = {
        "algorithm": "ppo", "critic": {"model": "policy", "optimizer": optimizer}, "optimizer": optimizer,
        "gpus_per_rank": 0, "timeout_s": 1800,
    } | COMMON | IN_LOSS | learner  # fmt: skip
    whole = remax.model_dump() | {"learner": settings}
    return Recipe.model_validate(whole | {"policy": whole["policy"] | {"dtype": dtype}})


def start(ours: Recipe) -> LearnerGroup:
    group = LearnerGroup(ours, algorithm_of(ours.learner), 2)
    group.wait_until_ready()
    return group


def state(group: LearnerGroup) -> tuple[dict, dict, dict]:
    """AdamW's first moments, the critic's master weights, and the algorithm's own state."""
    found = ray.get([rank.__ray_call__.remote(state_of_optimizers) for rank in group.ranks])[0]
    return *found, ray.get(group.ranks[0].__ray_call__.remote(lambda rank: rank.algorithm.state()))


def save(group: LearnerGroup, folder: Path) -> dict[str, str]:
    folder.mkdir()
    return group.save(folder)


def logprobs(group: LearnerGroup) -> dict:
    return {str(sample): torch.from_numpy(row) for sample, row in group.logprobs(shards(trajectories(0))).items()}


@pytest.fixture(scope="module")
def saved(cluster, tmp_path_factory) -> SimpleNamespace:
    """Two ranks under ZeRO-2: an update, a checkpoint, an update; back to the checkpoint, and that update again."""
    folder = tmp_path_factory.mktemp("saved")
    policy = save_policy(tmp_path_factory.mktemp("policy"))
    group = start(ppo(policy, ranks=2))
    run = SimpleNamespace(policy=policy, folder=folder)
    group.update(shards(trajectories(0)), batch(0))
    run.files = save(group, folder / "checkpoint")
    run.state = state(group)
    run.logprobs = logprobs(group)
    run.metrics = [group.update(shards(trajectories(1)), batch(1))]
    group.export(folder / "straight", "")
    run.after = state(group)
    group.load(folder / "checkpoint")
    run.metrics.append(group.update(shards(trajectories(1)), batch(1)))
    group.export(folder / "resumed", "")
    group.close()
    return run


def test_going_back_and_on_again_gives_the_same_bytes(saved):
    weights = [(saved.folder / name / "model.safetensors").read_bytes() for name in ("straight", "resumed")]
    assert weights[0] == weights[1]
    timeless = [{k: v for k, v in metrics.items() if not k.startswith("time/")} for metrics in saved.metrics]
    assert timeless[0] == timeless[1]
    assert sorted(saved.files) == [
        "critic-rank00000-00000.safetensors", "critic-rank00001-00000.safetensors", "learner.json",
        "policy-rank00000-00000.safetensors", "policy-rank00001-00000.safetensors",
        "rng-rank00000.safetensors", "rng-rank00001.safetensors",
    ]  # fmt: skip


def test_two_ranks_open_on_four_and_these_on_one(saved):
    """ZeRO-2 to ZeRO-3 to no ZeRO: every weight and moment to the last bit, and the next update but for rounding."""
    four = start(ppo(saved.policy, ranks=4, zero_stage=3))
    four.load(saved.folder / "checkpoint")
    assert_same_state(state(four), saved.state)
    assert distance(logprobs(four), saved.logprobs) < 1e-6
    files = save(four, saved.folder / "of_four")
    assert sum(name.startswith("critic") for name in files) == 4
    four.close()
    one = start(ppo(saved.policy, ranks=1, zero_stage=0))
    one.load(saved.folder / "of_four")
    assert_same_state_without_zero(one, saved.state)
    metrics = one.update(shards(trajectories(1)), batch(1))
    one.export(saved.folder / "one", "")
    one.close()
    for name, value in saved.metrics[0].items():
        if not name.startswith("time/") and "padding" not in name:
            assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_bfloat16_keeps_its_float32_masters(saved):
    """From one rank under ZeRO-1 to two under ZeRO-2: the masters are kept, not the rounded weights."""
    one = start(ppo(saved.policy, "bfloat16", ranks=1, zero_stage=1))
    one.update(shards(trajectories(0)), batch(0))
    save(one, saved.folder / "bfloat16")
    one.export(saved.folder / "before", "")
    masters = ray.get(one.ranks[0].__ray_call__.remote(master_weights))
    one.close()
    other = start(ppo(saved.policy, "bfloat16", ranks=2, zero_stage=2))
    other.load(saved.folder / "bfloat16")
    _, critic, _ = state(other)
    other.export(saved.folder / "after", "")
    other.close()
    assert all(torch.equal(critic[name], master) for name, master in masters.items())
    assert any(not torch.equal(master, master.bfloat16().float()) for master in masters.values())
    weights = [(saved.folder / name / "model.safetensors").read_bytes() for name in ("before", "after")]
    assert weights[0] == weights[1]


def master_weights(rank) -> dict:
    from c2f_ray.adapters.deepspeed import read_part
    from c2f_ray.learner.checkpoint import trainable

    critic = rank.algorithm.critic
    return {
        name: read_part(critic.engine, parameter)[1]["weight"].detach().view(parameter.shape).clone()
        for name, parameter in trainable(critic)
    }


def assert_same_state(found: tuple, expected: tuple) -> None:
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert found[2] == expected[2]
    assert found[2]["updates"] == 1
    assert found[2]["rewards"]["count"] == 12


def assert_same_state_without_zero(group: LearnerGroup, expected: tuple) -> None:
    """DeepSpeed's own way of reading an optimizer knows ZeRO only."""

    def read(rank) -> dict:
        models = {"policy.": rank.policy, "critic.": rank.algorithm.critic}
        return {
            key + name.removeprefix("model." if key == "policy." else ""): model.engine.optimizer.state[p]["exp_avg"]
            for key, model in models.items()
            for name, p in model.module.named_parameters()
        }

    moments = ray.get(group.ranks[0].__ray_call__.remote(read))
    assert moments.keys() == expected[0].keys()
    assert all(torch.equal(moments[name], moment) for name, moment in expected[0].items())
    critic = ray.get(group.ranks[0].__ray_call__.remote(master_weights))
    assert all(torch.equal(critic[name], weight) for name, weight in expected[1].items())
