"""Which responses rejection sampling keeps."""

import numpy as np
import pytest

from c2f_ray.algorithms.selection import best_of_prompt, select

ROWS = np.array([7, 7, 3, 3, 3, 5, 5])
REWARD = np.array([0.1, 0.9, 2.0, -1.0, 0.5, 0.3, 0.2], np.float32)


def test_the_best_of_each_prompt():
    assert best_of_prompt(ROWS, REWARD, [0]).tolist() == [2, 5, 1]
    assert select(ROWS, REWARD, [0], None, 1.0).tolist() == [1, 2, 5]


def test_margins_over_the_prompts_mean():
    """They are 2 - 0.5 = 1.5, 0.9 - 0.5 = 0.4 and 0.3 - 0.25 = 0.05."""
    assert select(ROWS, REWARD, [0], 0.05 - 1e-6, 1.0).tolist() == [1, 2, 5]
    assert select(ROWS, REWARD, [0], 0.06, 1.0).tolist() == [1, 2]
    assert select(ROWS, REWARD, [0], 9.0, 1.0).tolist() == [2], "the largest, where none is enough"


def test_the_top_fraction_of_the_best():
    assert select(ROWS, REWARD, [0], None, 0.34).tolist() == [1, 2], "two of three: rounded up"
    assert select(ROWS, REWARD, [0], None, 0.01).tolist() == [2]
    assert select(ROWS, REWARD, [0], 0.06, 0.5).tolist() == [2], "of those with the margin"


def test_ties_are_broken_by_the_seed_and_evenly():
    rows, reward = np.repeat([0, 1], 4), np.array([1, 1, 1, 1, 0, 2, 2, 0], np.float32)
    found = [best_of_prompt(rows, reward, [seed, 3]).tolist() for seed in range(400)]
    assert found[:5] == [best_of_prompt(rows, reward, [seed, 3]).tolist() for seed in range(5)]
    for index, share in ((0, 0.25), (3, 0.25)):
        assert np.mean([first == index for first, _ in found]) == pytest.approx(share, abs=0.07)
    assert {second for _, second in found} == {5, 6}
