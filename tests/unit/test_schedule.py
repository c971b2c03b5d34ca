"""Learning-rate factors by hand."""

import pytest

from c2f_ray.learner.schedule import lr_factor
from c2f_ray.recipe import Optimizer


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.8535533905932737, 0.5, 0.14644660940672627]),
    ],
)
def test_six_updates_with_two_of_warm_up(schedule, expected):
    optimizer = Optimizer(lr=1.0, schedule=schedule, warmup_steps=2)
    assert [lr_factor(optimizer, update, 6) for update in range(6)] == pytest.approx(expected)


def test_a_run_no_longer_than_its_warm_up():
    optimizer = Optimizer(lr=1.0, schedule="linear", warmup_steps=4)
    assert [lr_factor(optimizer, update, 3) for update in range(3)] == [0.25, 0.5, 0.75]
