"""Which responses rejection sampling keeps."""

import numpy as np
import pytest

from c2f_ray.data.prompts import draw
from c2f_ray.losses.selection import best_of_draw, select

DRAWS = np.array([7, 7, 3, 3, 3, 5, 5])
REWARD = np.array([0.1, 0.9, 2.0, -1.0, 0.5, 0.3, 0.2], np.float32)


def test_the_best_of_each_prompt():
    assert best_of_draw(DRAWS, REWARD, [0]).tolist() == [2, 5, 1]
    assert select(DRAWS, REWARD, [0], None, 1.0).tolist() == [1, 2, 5]


def test_margins_over_the_prompts_mean():
    """They are 2 - 0.5 = 1.5, 0.9 - 0.5 = 0.4 and 0.3 - 0.25 = 0.05."""
    assert select(DRAWS, REWARD, [0], 0.05 - 1e-6, 1.0).tolist() == [1, 2, 5]
    assert select(DRAWS, REWARD, [0], 0.06, 1.0).tolist() == [1, 2]
    assert select(DRAWS, REWARD, [0], 9.0, 1.0).tolist() == [2], "the largest, where none is enough"


def test_the_top_fraction_of_the_best():
    assert select(DRAWS, REWARD, [0], None, 0.34).tolist() == [1, 2], "two of three: rounded up"
    assert select(DRAWS, REWARD, [0], None, 0.01).tolist() == [2]
    assert select(DRAWS, REWARD, [0], 0.06, 0.5).tolist() == [2], "of those with the margin"


def test_a_margin_of_zero_changes_nothing_where_all_rewards_are_equal():
    draws = np.repeat(np.arange(200), 7)
    equal = np.full(1400, 0.1, np.float32)
    assert len(select(draws, equal, [0], 0.0, 1.0)) == 200
    assert len(select(draws, equal, [0], 1e-12, 1.0)) == 1, "the largest, where none is enough"


@pytest.mark.parametrize(("fraction", "count", "kept"), [(0.07, 100, 7), (0.29, 100, 29), (0.1, 30, 3), (0.5, 7, 4)])
def test_a_fraction_is_taken_as_it_is_written(fraction: float, count: int, kept: int):
    draws = np.arange(count)
    assert len(select(draws, draws.astype(np.float32), [0], None, fraction)) == kept


def test_two_draws_of_one_prompt_stay_apart():
    """Two sources of 10 and 1,000 prompts, drawn uniformly 200 times: each draw keeps one response."""
    sources = [list(range(10)), list(range(10, 1010))]
    drawn = np.array([row for row, _ in draw(0, 200, sources, seed=3, shuffle=True)])
    assert len(np.unique(drawn)) < 200, "the small source's prompts come again"
    numbers, reward = np.repeat(np.arange(200), 4), np.random.default_rng(0).random(800).astype(np.float32)
    kept = drawn[numbers[select(numbers, reward, [0], None, 1.0)]]
    assert ((kept < 10).sum(), (kept >= 10).sum()) == (100, 100)


def test_ties_are_broken_by_the_seed_and_evenly():
    rows, reward = np.repeat([0, 1], 4), np.array([1, 1, 1, 1, 0, 2, 2, 0], np.float32)
    found = [best_of_draw(rows, reward, [seed, 3]).tolist() for seed in range(400)]
    assert found[:5] == [best_of_draw(rows, reward, [seed, 3]).tolist() for seed in range(5)]
    for index, share in ((0, 0.25), (3, 0.25)):
        assert np.mean([first == index for first, _ in found]) == pytest.approx(share, abs=0.07)
    assert {second for _, second in found} == {5, 6}
