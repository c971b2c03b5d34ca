"""Rewards by a user's function, which may be async."""

import numpy as np
import pytest

from c2f_ray.recipe import FunctionReward
from c2f_ray.reward.function import FunctionScorer
from c2f_ray.reward.samples import Sample

SAMPLES = [
    Sample([{"role": "user", "content": "1+1?"}], "2", True, {"answer": "2"}),
    Sample([{"role": "user", "content": "1+2?"}], "four", False, {"answer": "3"}),
]


def exact(samples):
    return [float(sample.response == sample.record["answer"] and sample.finished) for sample in samples]


async def exact_later(samples):
    return np.array(exact(samples))


@pytest.mark.parametrize("function", ["exact", "exact_later"])
def test_one_number_for_each_sample(function: str):
    scorer = FunctionScorer(FunctionReward(kind="function", function=f"{__name__}:{function}"))
    assert list(scorer.score(SAMPLES)) == [1.0, 0.0]
