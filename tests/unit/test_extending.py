"""What docs/extending.md says of rewards and length rules; an algorithm is added in test_group_baseline.py."""

from pathlib import Path

import numpy as np
import pytest

from c2f_ray.driver import length as length_control
from c2f_ray.driver.length import LengthDecision, LengthState
from c2f_ray.driver.training import Training, first_state
from c2f_ray.learner.batching import UpdateBatch
from c2f_ray.recipe import FunctionReward, load_recipe
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
