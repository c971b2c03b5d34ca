"""Truncated importance weights against numbers worked by hand."""

import math

import pytest
import torch

from c2f_ray.losses import importance


def test_weights_are_ratios_up_to_the_clip():
    policy = torch.tensor([0.5, 0.3, 0.1], requires_grad=True).log()
    sampler = torch.tensor([0.25, 0.3, 0.4]).log()
    assert importance.weights(policy, sampler, None).tolist() == pytest.approx([2.0, 1.0, 0.25])
    assert importance.weights(policy, sampler, 1.5).tolist() == pytest.approx([1.5, 1.0, 0.25])
    assert not importance.weights(policy, sampler, 1.5).requires_grad


def test_the_mean_weight_is_one_over_the_sampler():
    """Without truncation the weights make any expectation under the sampler one under the policy."""
    policy, sampler = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    weights = importance.weights(policy.log(), sampler.log(), None)
    values = torch.tensor([1.0, -2.0, 5.0])
    assert float((sampler * weights).sum()) == pytest.approx(1.0)
    assert float((sampler * weights * values).sum()) == pytest.approx(float((policy * values).sum()))
    assert math.isclose(
        float((sampler * importance.weights(policy.log(), sampler.log(), 2.0)).sum()), 0.7, abs_tol=1e-6
    )
