"""Rewards by a user's function: what it may return, and who is blamed for what it may not."""

import numpy as np
import pytest

from c2f_ray.errors import BadRewardError
from c2f_ray.recipe.schema import FunctionReward
from c2f_ray.reward.function import FunctionScorer, Sample

SAMPLES = [
    Sample([{"role": "user", "content": "1+1?"}], "2", True, {"answer": "2"}),
    Sample([{"role": "user", "content": "1+2?"}], "four", False, {"answer": "3"}),
]


def exact(samples):
    return [float(sample.response == sample.record["answer"] and sample.finished) for sample in samples]


async def exact_later(samples):
    return np.array(exact(samples))


def scorer(function) -> FunctionScorer:
    return FunctionScorer(FunctionReward(kind="function", function=f"{__name__}:{function}"))


@pytest.mark.parametrize("function", ["exact", "exact_later"])
def test_one_number_for_each_sample(function: str):
    rewards = scorer(function).score(SAMPLES)
    assert rewards.dtype == np.float32
    assert rewards.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        ([1.0], "returned 1 rewards for 2 samples; return a list of as many"),
        (None, "returned a NoneType for 2 samples; return a list of as many"),
        (0.5, "returned a float for 2 samples"),
        ([1.0, float("nan")], "returned nan for the response 'four'"),
        ([float("inf"), 0.0], "returned inf for the response '2'"),
        ([1.0, "0.5"], "returned '0.5' for the response 'four'"),
        ([None, 0.0], "returned None for the response '2'"),
    ],
)
def test_what_is_no_reward_is_blamed_on_the_function_and_its_sample(returned: object, problem: str):
    ours = scorer("exact")
    ours.function = lambda samples: returned
    with pytest.raises(BadRewardError) as error:
        ours.score(SAMPLES)
    assert str(error.value).startswith(f"{__name__}:exact {problem}")
