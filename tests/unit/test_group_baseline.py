"""Baselines from the other samples of a draw, by hand, and against the papers' formulas in float64."""

import numpy as np
import pytest

from c2f_ray.algorithms.base import ScoredStep
from c2f_ray.algorithms.group_baseline import GroupBaseline
from c2f_ray.data.trajectory import TrajectoryInfo
from c2f_ray.errors import RecipeError
from c2f_ray.losses.baselines import group_baseline
from c2f_ray.recipe import Passes, load_recipe

DRAW = np.array([4, 9, 4, 9, 4, 9, 2])
REWARD = np.array([1, 10, 2, 10, 6, 10, 5], np.float32)
GROUPS = ["learner={algorithm: group_baseline, optimizer: {lr: 1e-3}, gpus_per_rank: 0}", "run.steps=1"]


def test_leave_one_out_is_the_mean_of_the_others_and_nothing_for_a_sample_that_is_alone():
    baseline, scale = group_baseline(DRAW, REWARD, "leave_one_out")
    assert baseline.tolist() == [4, 10, 3.5, 10, 1.5, 10, 5], "(2 + 6) / 2, (1 + 6) / 2, (1 + 2) / 2"
    assert scale is None
    assert (REWARD - baseline)[6] == 0


def test_the_mean_and_its_deviation():
    """The first draw has 1, 2 and 6: their mean is 3, the sum of squares 4 + 1 + 9, the sample variance 7."""
    baseline, _ = group_baseline(DRAW, REWARD, "mean")
    assert baseline.tolist() == [3, 10, 3, 10, 3, 10, 5]
    baseline, scale = group_baseline(DRAW, REWARD, "mean_and_deviation")
    assert scale is not None
    advantages = (REWARD - baseline) / scale
    assert advantages == pytest.approx([-2 / 7**0.5, 0, -1 / 7**0.5, 0, 3 / 7**0.5, 0, 0], rel=1e-6)


@pytest.mark.parametrize("size", [2, 5, 64])
def test_the_papers_formulas_in_float64(size: int):
    """RLOO: r_i - sum(others) / (k - 1), which is k / (k - 1) times GRPO's r_i - mean."""
    generator = np.random.default_rng(size)
    reward = (1000 + generator.normal(size=(7, size))).astype(np.float32)
    draw = np.repeat(np.arange(7), size)
    order = generator.permutation(draw.size)
    found, _ = group_baseline(draw[order], reward.ravel()[order], "leave_one_out")
    exact = reward.astype(np.float64)
    expected = (exact.sum(1, keepdims=True) - exact) / (size - 1)
    np.testing.assert_allclose(found, expected.ravel()[order], rtol=1e-7)
    mean, _ = group_baseline(draw, reward.ravel(), "mean")
    advantage = exact - expected
    np.testing.assert_allclose(exact.ravel() - mean, advantage.ravel() * (size - 1) / size, atol=2**-13)


def test_two_draws_of_one_row_are_two_groups():
    """The row is 0 for all; only the draw tells them apart."""
    n = 4
    zeros = np.zeros(n, np.int64)
    info = TrajectoryInfo(
        sample_id=np.arange(n), prompt_row=zeros, greedy=zeros > 0, finished=zeros == 0, interrupted=zeros > 0,
        prompt_tokens=zeros.astype(np.int32), response_tokens=zeros.astype(np.int32),
        weight_version=zeros.astype(np.int32),
    )  # fmt: skip
    learner = load_recipe("tiny", *GROUPS, "rollout.samples_per_prompt=2").learner
    reward = np.array([1, 3, 100, 300], np.float32)
    batch = GroupBaseline.batch(ScoredStep(info, np.array([0, 0, 1, 1]), reward), learner, [0])
    assert batch.baseline is not None
    assert batch.baseline.tolist() == [3, 1, 300, 100]


def test_one_sample_per_prompt_is_refused_and_the_plan_knows_the_update():
    with pytest.raises(RecipeError) as error:
        load_recipe("tiny", *GROUPS)
    (problem,) = error.value.problems
    assert "rollout.samples_per_prompt: 1: group_baseline compares a prompt's samples; give 2 or more" in problem
    learner = load_recipe("tiny", *GROUPS, "rollout.samples_per_prompt=4").learner
    assert learner.passes(256) == [Passes("policy", 1, 1, 1)]
    assert learner.learned_samples(64, 4) == 256
    assert (learner.needs_greedy, learner.baseline_metric) == (False, "reward/baseline_mean")
