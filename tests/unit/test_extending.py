"""What docs/extending.md says can be added from outside, each in under 40 lines."""

from pathlib import Path

import numpy as np
import pytest

from c2f_ray.data.trajectory import TrajectoryInfo
from c2f_ray.driver import length as length_control
from c2f_ray.driver import loop as driver
from c2f_ray.driver.length import LengthDecision, LengthState
from c2f_ray.driver.sampling import Rollouts
from c2f_ray.driver.training import Training, first_state
from c2f_ray.learner.batching import UpdateBatch
from c2f_ray.recipe import load_recipe
from c2f_ray.recipe.schema import FunctionReward
from c2f_ray.reward.function import FunctionScorer
from c2f_ray.reward.samples import Sample

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def training_with(kind: type[Training], recipe: object, **attributes: object) -> Training:
    """Without its actors."""
    training = object.__new__(kind)
    vars(training).update(recipe=recipe, **attributes)
    return training


def test_a_new_reward(tmp_path, monkeypatch):
    (tmp_path / "brevity.py").write_text(
        "def score(samples):\n    return [-0.01 * len(sample.response) + sample.finished for sample in samples]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipe = load_recipe(TINY, "reward={kind: function, function: 'brevity:score'}")
    assert isinstance(recipe.reward, FunctionReward)
    samples = [Sample([], "x" * 20, True, {}), Sample([], "x" * 150, False, {})]
    assert FunctionScorer(recipe.reward).score(samples) == pytest.approx([0.8, -1.5])


def test_a_new_algorithm(monkeypatch):
    class LeaveOneOut(Training):
        """REINFORCE with the mean reward of a prompt's other samples as the baseline (arXiv 2402.14740)."""

        @property
        def greedy_rollouts(self) -> bool:
            return False

        def update_batch(self, rollouts: Rollouts) -> UpdateBatch:
            rewards = rollouts.rewards
            _, prompt, count = np.unique(rollouts.info.prompt_row, return_inverse=True, return_counts=True)
            others = np.bincount(prompt, rewards)[prompt] - rewards
            baseline = (others / (count[prompt] - 1)).astype(np.float32)
            return UpdateBatch(rollouts.info.sample_id, rewards, baseline)

    monkeypatch.setattr(driver, "training_of", lambda learner: LeaveOneOut)
    training = training_with(LeaveOneOut, load_recipe(TINY, "rollout.samples_per_prompt=3"))
    info = TrajectoryInfo(
        sample_id=np.arange(6), prompt_row=np.array([7, 7, 7, 2, 2, 2]), greedy=np.zeros(6, bool),
        finished=np.ones(6, bool), interrupted=np.zeros(6, bool), prompt_tokens=np.full(6, 4, np.int32),
        response_tokens=np.full(6, 8, np.int32), weight_version=np.zeros(6, np.int32),
    )  # fmt: skip
    rewards = np.array([1, 0, 2, 5, 5, 2], np.float32)
    rollouts = Rollouts(
        step=1, shards=[], scored=[], info=info, rewards=rewards, parts={}, limit=16, dropped=0, ready=1.0
    )
    batch = training.update_batch(rollouts)
    assert batch.baseline is not None
    assert batch.baseline.tolist() == [1.0, 1.5, 0.5, 3.5, 3.5, 5.0]
    assert (batch.reward - batch.baseline).sum() == pytest.approx(0)
    assert driver.training_of(training.recipe.learner) is LeaveOneOut


def test_a_new_length_rule(monkeypatch):
    def doubling(length, state, inputs):
        """The limit doubles after every second step."""
        step = state.step + 1
        limit = min(length.start_tokens * 2 ** (step // 2), length.max_tokens)
        return LengthState(limit, step), LengthDecision(inputs.mean_reward, inputs.critic, limit)

    monkeypatch.setattr(length_control, "observe", doubling)
    recipe = load_recipe(TINY)  # from 16 to 96 tokens
    state = first_state(recipe)
    training = training_with(Training, recipe, state=state)
    batch = UpdateBatch(np.arange(2), np.array([1, 0], np.float32), np.zeros(2, np.float32))
    limits = []
    for _ in range(7):
        limits.append(state.length.tokens)
        decision = training.observe(batch, {"learner/skipped": 0.0})
        assert decision is not None and decision.mean_reward == 0.5
    assert limits == [16, 16, 32, 32, 64, 64, 96]


def test_none_of_them_takes_40_lines():
    source = Path(__file__).read_text().split("\n\n\ndef test_a_new_")[1:]
    assert [len(part.split("\n\n\ndef ")[0].splitlines()) < 40 for part in source] == [True] * 3
