"""The real driver and pools on fake actors: what they ask for comes back, and a step takes what the plan says."""

import re
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import ray
from typer.testing import CliRunner

from c2f_ray.cli import app
from c2f_ray.plan.clusters import chosen_nodes
from c2f_ray.plan.estimate import estimate
from c2f_ray.recipe import FunctionReward, Recipe, load_recipe
from c2f_ray.recipe.roles import Scorer
from c2f_ray.reward.rewards import Rewards
from c2f_ray.rollout.pool import RolloutPool, RolloutRequest
from c2f_ray.simulate import run as simulation
from c2f_ray.simulate.fakes import FakeActors, FakeWork
from c2f_ray.simulate.run import simulate
from tests.documented import documented

CONFIGS = Path(__file__).parents[2] / "configs"
NETWORK = 12.5e9
PIPELINED = ("rollout.max_staleness=1", "learner.importance_clip=2.0")


def remax(*overrides: str) -> Recipe:
    return load_recipe(CONFIGS / "mistral_7b_remax.yaml", *overrides)


@pytest.mark.parametrize("overrides", [(), PIPELINED], ids=["synchronous", "pipelined"])
def test_a_simulated_step_takes_what_the_plan_says(cluster, monkeypatch, overrides):
    monkeypatch.setattr(simulation, "STEP_S", 3.0)
    monkeypatch.setattr(simulation, "STEPS", 3)
    recipe = remax("rollout.shard_samples=4", *overrides)
    found = simulate(recipe, estimate(recipe, chosen_nodes(recipe, None, None, 8, None, None), NETWORK), NETWORK)
    assert len(found.steps) == 3
    # Where steps overlap, the first samples for itself and for the second, and the last for none.
    full = found.steps[1:-1] if overrides else found.steps
    quickest = min(full, key=lambda step: step.seconds)  # a busy machine adds to a step, and nothing takes from it
    assert 0.98 * found.planned.seconds < quickest.seconds < 1.6 * found.planned.seconds
    if not overrides:
        assert 0.98 * found.planned.learner < quickest.parts["learner"] < 1.6 * found.planned.learner
    if overrides:
        sampling = max(found.planned.rollout, found.planned.reward)
        assert found.steps[0].seconds > 0.98 * (sampling + found.planned.learner + found.planned.weights)
        assert min(step.parts["rollout"] for step in found.steps[1:-1]) > 0.98 * found.planned.rollout


def test_fake_actors_give_what_was_asked_for(cluster):
    recipe = remax("rollout.actors=64", "rollout.shard_samples=3")
    reward = FunctionReward(kind="function", function="none:none", workers=16)
    work = FakeWork(samples=(0.001,), scores=[(Scorer(reward), 0.001)], update=0.0, transfer=0.0, response_tokens=5)
    requests = [RolloutRequest(7 * i, i // 2, i, i % 2 == 1) for i in range(1000)]
    with (
        closing(FakeActors(work=work)) as actors,
        closing(RolloutPool(recipe, ray.put(None), 768, "dummy", placement=actors)) as pool,
        closing(Rewards(reward, recipe.cluster, "", ray.put(None), placement=actors)) as rewards,
    ):
        pool.wait_until_ready()
        rewards.wait_until_ready()
        ray.get([actor.take_version.remote(3) for actor in pool.take_started()])
        shards = list(pool.generate(requests, 384, ordered=False))
        asked = [rewards.submit(shard, info.response_tokens, info.finished) for shard, info in shards]
        scored = rewards.collect(asked)
    assert sorted(id for _, info in shards for id in info.sample_id.tolist()) == [7 * i for i in range(1000)]
    # 500 prompts in 64 parts: 52 of 8, and 12 of 7 whose 14 requests make 4 full shards of 3 and one of 2.
    sizes = [len(info) for _, info in shards]
    assert (sizes.count(3), sizes.count(2), sizes.count(1)) == (52 * 5 + 12 * 4, 12, 52)
    for (shard, info), score in zip(shards, scored, strict=True):
        assert score.rewards.tolist() == info.weight_version.tolist() == [3.0] * len(info)
        assert info.greedy.tolist() == [id % 14 == 7 for id in info.sample_id]
        assert info.response_tokens.tolist() == [384] * len(info)
        assert np.diff(ray.get(shard).response.offsets).tolist() == [5] * len(info)


def test_the_command_prints_the_timeline(cluster, monkeypatch, tmp_path):
    """Two scorers, held-out prompts and no model that is there."""
    (tmp_path / "configs").symlink_to(CONFIGS, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(simulation, "STEP_S", 0.5)
    settings = ["prompts.per_step=64", "rollout.samples_per_prompt=4", "evaluate.num_prompts=20"]
    command = documented("c2f-ray plan configs/merlinite_7b_pt.yaml --simulate")
    ran = CliRunner().invoke(app, [*command, *settings], env={"COLUMNS": "200"})
    assert ran.exit_code == 0, ran.output
    assert re.search(r"^by the estimate [\d,.]+ s a step, simulated [\d,.]+ s, [+-]\d+%", ran.output, re.MULTILINE)
    printed = ran.output.partition("simulated steps")[2].splitlines()
    assert [line.split()[1] for line in printed if line.startswith("│")] == ["1", "2", "3"], "the recipe's three rounds"
    rows = {line.split()[0]: line for line in printed if "█" in line or "▏" in line}
    assert set(rows) >= {"rollout", "learner"}
    assert [path.name for path in tmp_path.iterdir()] == ["configs"], "nothing is written"
