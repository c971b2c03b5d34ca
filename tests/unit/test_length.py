"""The response limit: Continuous Maximization's logistic rule, and the fixed and linear schedules."""

import itertools
import json
from dataclasses import asdict

import numpy as np
import pytest

from c2f_ray.driver.length import LengthInputs, LengthState, observe, start
from c2f_ray.losses.baselines import reward_spread
from c2f_ray.recipe import FixedLength, LinearLength, LogisticLength

LOGISTIC = LogisticLength(
    rule="logistic",
    start_tokens=100,
    max_tokens=130,
    max_step_tokens=10.0,
    reward_weight=1.0,
    critic_weight=0.5,
    bias=0.0,
    decay=0.5,
    z_clip=2.0,
)


def run(length, features, state=None):
    state = state or start(length)
    decisions = []
    for mean_reward, critic in features:
        state, decision = observe(length, state, LengthInputs(mean_reward, critic))
        decisions.append(decision)
    return state, decisions


def test_logistic_rule_by_hand():
    # step  reward  its z                              critic  its z                      p                 limit
    # 1     1.0     0 (nothing before)                 0.40    0                          0.5               105
    #       mean 1, variance 0                         mean 0.4, variance 0
    # 2     2.0     0 (no variance before)             0.20    0                          0.5               110
    #       mean 1.5, variance 0.5 (0 + 0.5 * 1)       mean 0.3, variance 0.5 (0 + 0.5 * 0.04) = 0.01
    # 3     2.0     (2 - 1.5) / 0.5 = 1                0.25    (0.25 - 0.3) / 0.1 = -0.5  sigmoid(1 + 0.25) 117.773
    #       mean 1.75, variance 0.5 (0.25 + 0.5 * 0.25) = 0.1875            mean 0.275
    # 4     0.0     -1.75 / 0.433 = -4.04, clipped -2  0.275   0                          sigmoid(-2)       118.965
    state, decisions = run(LOGISTIC, [(1.0, 0.4), (2.0, 0.2), (2.0, 0.25), (0.0, 0.275)])
    assert [d.z_reward for d in decisions] == pytest.approx([0, 0, 1, -2], abs=1e-12)
    assert [d.z_critic for d in decisions] == pytest.approx([0, 0, -0.5, 0], abs=1e-12)
    assert [d.p for d in decisions] == pytest.approx([0.5, 0.5, 0.7772998611746911, 0.11920292202211755], rel=1e-12)
    assert [d.limit for d in decisions] == pytest.approx([105, 110, 117.77299861174691, 118.96502783196809], rel=1e-12)
    assert state.reward_mean == pytest.approx(0.875)  # 1.75 - 0.5 * 1.75
    assert state.reward_variance == pytest.approx(0.859375)  # 0.5 (0.1875 + 0.5 * 1.75^2)
    assert state.tokens == 118


def test_logistic_stops_at_the_maximum_and_never_shrinks():
    worse_and_worse = [(-float(step), float(step)) for step in range(60)]
    state, decisions = run(LOGISTIC, worse_and_worse)
    limits = [d.limit for d in decisions]
    assert all(a <= b for a, b in itertools.pairwise(limits))
    # From the third step on both features are at or beyond -+1 standard deviation; p stays above 0 and below a half.
    assert all(0 < d.p < 0.5 for d in decisions[2:])
    state, _ = run(LOGISTIC, [(1.0, 0.5)] * 100, state)
    assert state.limit == 130.0
    assert state.tokens == 130


def test_constant_features_have_no_scale():
    _, decisions = run(LOGISTIC, [(0.3, 0.3)] * 20)
    assert {d.z_reward for d in decisions} == {0.0}
    assert {d.p for d in decisions} == {0.5}


def test_growth_below_one_token_adds_up():
    slow = LOGISTIC.model_copy(update={"max_step_tokens": 0.3})
    tokens = [run(slow, [(0.0, 0.0)] * steps)[0].tokens for steps in range(1, 9)]
    assert tokens == [100] * 6 + [101] * 2  # 0.15 a step: 100.90 after six, 101.05 after seven


def test_a_saved_state_goes_on_exactly():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(12, 2)).tolist()
    whole, decisions = run(LOGISTIC, features)
    first, _ = run(LOGISTIC, features[:5])
    resumed, rest = run(LOGISTIC, features[5:], LengthState(**json.loads(json.dumps(asdict(first)))))
    assert resumed == whole
    assert rest == decisions[5:]


def test_linear_reaches_its_maximum_exactly():
    linear = LinearLength(rule="linear", start_tokens=64, max_tokens=100, over_steps=7)
    limits = [start(linear).tokens] + [run(linear, [(0.0, 0.0)] * steps)[0].tokens for steps in range(1, 10)]
    # 64 + 36 k / 7: 69.1, 74.3, 79.4, 84.6, 89.7, 94.9, 100
    assert limits == [64, 69, 74, 79, 84, 89, 94, 100, 100, 100]


def test_fixed_is_fixed():
    fixed = FixedLength(rule="fixed", max_tokens=384)
    state, decisions = run(fixed, [(1.0, 0.0), (5.0, 0.0)])
    assert (start(fixed).tokens, state.tokens, state.step) == (384, 384, 2)
    assert decisions[1].p is None


def test_reward_spread_is_a_population_standard_deviation():
    reward, greedy = np.float32([1, 2, 4]), np.float32([1, 1, 1])
    # differences 0, 1, 3: mean 4/3, variance (16 + 1 + 25) / 27 = 14/9
    assert reward_spread(reward, greedy) == pytest.approx((14 / 9) ** 0.5)
