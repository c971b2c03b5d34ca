"""PPO's losses, rewards and KL by hand, and their gradients against finite differences."""

import math

import numpy as np
import pytest
import torch

from c2f_ray.losses import gae, kl
from c2f_ray.losses import policy as ppo
from c2f_ray.losses.running import Moments

# Ratio, advantage, and the loss with clip 0.2: unclipped, clipped above, clipped below, and the two ways out of the
# range that the clip must not stop because they undo what the advantage asks for.
TABLE = [
    (1.1, 2.0, -2.2, False),
    (1.5, 2.0, -2.4, True),
    (0.5, 2.0, -1.0, False),
    (0.5, -2.0, 1.6, True),
    (1.5, -2.0, 3.0, False),
]


def column(i: int) -> torch.Tensor:
    return torch.tensor([row[i] for row in TABLE], dtype=torch.float64)


def test_a_token_that_the_reference_rules_out_does_not_take_over():
    """At d = -30 k3 would be e^30 - 31 = 1e13. With the log ratio clipped at 2 it is e^2 - 3; at most it is 10."""
    logprobs = torch.tensor([-40.0], requires_grad=True)
    found = kl.estimate(logprobs, torch.tensor([-10.0]), "k3", 2.0)
    assert found.item() == pytest.approx(math.exp(2) - 3)
    assert torch.autograd.grad(found.sum(), logprobs)[0].item() == 0.0
    assert kl.estimate(logprobs, torch.tensor([-10.0]), "k3", 20.0).item() == 10.0


@pytest.mark.parametrize("d", [-8.0, -12.0, -20.0])
def test_one_token_leaves_the_whitened_advantages_of_the_others_as_they_were(d: float):
    """1,000 tokens with advantages of deviation 1, of which one has this log ratio, at a coefficient of 0.05."""
    advantages = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    advantages = (advantages - advantages.mean()) / advantages.std()
    logprobs = torch.zeros(1000)
    logprobs[0] = d
    penalised = advantages - 0.05 * kl.estimate(logprobs, torch.zeros(1000), "k3", 20.0)
    assert gae.whiten(penalised, "unbiased")[1:].std().item() == pytest.approx(0.999, abs=2e-3)


def test_policy_loss_by_hand():
    old = torch.tensor([-1.0, -2.0, -3.0, -0.5, -4.0], dtype=torch.float64)
    logprobs = (old + column(0).log()).requires_grad_()
    found = ppo.policy_loss(logprobs, old, column(1), 0.2, None, 20.0)
    torch.testing.assert_close(found.loss, column(2), rtol=1e-14, atol=0)
    assert found.clipped.tolist() == [row[3] for row in TABLE]
    assert not found.dual_clipped.any()
    # ratio - 1 - log(ratio): KL(old || new) of 1.1 and 0.5
    assert found.approx_kl[0].item() == pytest.approx(0.1 - math.log(1.1))
    assert found.approx_kl[2].item() == pytest.approx(-0.5 + math.log(2))
    found.loss.sum().backward()
    # d(-A ratio)/d logprob = -A ratio where the clip does not hold
    assert logprobs.grad.tolist() == pytest.approx([-2.2, 0.0, -1.0, 0.0, 3.0])


def test_dual_clip_bounds_bad_tokens_only():
    old = torch.zeros(4, dtype=torch.float64)
    ratio = torch.tensor([5.0, 5.0, 2.0, 0.1], dtype=torch.float64)
    advantages = torch.tensor([-1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    logprobs = ratio.log().requires_grad_()
    found = ppo.policy_loss(logprobs, old, advantages, 0.2, 3.0, 20.0)
    # -A ratio = 5 is held at 3; 1.2; 2 is below 3; 0.8
    torch.testing.assert_close(found.loss, torch.tensor([3.0, -1.2, 2.0, 0.8], dtype=torch.float64))
    assert found.dual_clipped.tolist() == [True, False, False, False]
    found.loss.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([0.0, 0.0, 2.0, 0.0])


def test_log_ratios_are_clipped_before_the_exponential():
    logprobs, old = torch.tensor([0.0, -200.0]), torch.tensor([-200.0, 0.0])
    found = ppo.policy_loss(logprobs, old, torch.tensor([-1.0, -1.0]), 0.2, None, 3.0)
    torch.testing.assert_close(found.loss, torch.tensor([math.exp(3.0), 0.8]))


def test_value_loss_by_hand():
    values = torch.tensor([1.0, 1.5, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([0.9, 1.0, 1.0, 1.0], dtype=torch.float64)
    returns = torch.tensor([2.0, 3.0, -1.0, 1.0], dtype=torch.float64)
    loss, clipped = ppo.value_loss(values, old, returns, 0.2)
    # within 0.2 of the old value: 0.5 * 1; held at 1.2: 0.5 * 1.8^2 over 0.5 * 1.5^2; held at 0.8: 0.5 * 1.8^2
    # over 0.5; held at 1.2: 0.5 * 0.2^2 is less than 0.5 * 1, so the value goes back freely
    torch.testing.assert_close(loss, torch.tensor([0.5, 1.62, 1.62, 0.5], dtype=torch.float64))
    assert clipped.tolist() == [False, True, True, False]
    loss.sum().backward()
    assert values.grad.tolist() == pytest.approx([-1.0, 0.0, 0.0, 1.0])
    loss, clipped = ppo.value_loss(values, old, returns, None)
    torch.testing.assert_close(loss, torch.tensor([0.5, 1.125, 0.5, 0.5], dtype=torch.float64))
    assert not clipped.any()


def test_kl_estimators_by_hand():
    # pi / pi_ref = 2 and 1/4: d = log 2 and -2 log 2
    logprobs, reference = torch.tensor([[0.5, 0.1], [0.25, 0.4]], dtype=torch.float64).log()
    log2 = math.log(2)
    assert kl.estimate(logprobs, reference, "k1", 20.0).tolist() == pytest.approx([log2, -2 * log2])
    assert kl.estimate(logprobs, reference, "k2", 20.0).tolist() == pytest.approx([log2**2 / 2, 2 * log2**2])
    assert kl.estimate(logprobs, reference, "k3", 20.0).tolist() == pytest.approx([0.5 - 1 + log2, 4 - 1 - 2 * log2])


@pytest.mark.parametrize(("estimator", "expected"), [("k1", "zero"), ("k2", "reverse"), ("k3", "forward")])
def test_what_each_estimators_gradient_is_in_expectation(estimator, expected):
    """As a loss, over all tokens by their probability: why k1 is refused there."""
    torch.manual_seed(0)
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(6, dtype=torch.float64).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    p = logprobs.detach().exp()
    (found,) = torch.autograd.grad((p * kl.estimate(logprobs, reference, estimator, 20.0)).sum(), logits)
    logprobs = logits.log_softmax(-1)
    true = {
        "zero": 0.0 * logprobs.sum(),
        "reverse": (logprobs.exp() * (logprobs - reference)).sum(),  # KL(pi || pi_ref)
        "forward": (reference.exp() * (reference - logprobs)).sum(),  # KL(pi_ref || pi)
    }
    (gradient,) = torch.autograd.grad(true[expected], logits)
    torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-15)


def test_the_coefficient_seeks_its_target():
    # 3 over a target of 6: error -0.5, clipped to -0.2; 6.6: 0.1; 60: 0.2
    assert kl.next_coefficient(0.1, 3.0, 6.0) == pytest.approx(0.098)
    assert kl.next_coefficient(0.1, 6.6, 6.0) == pytest.approx(0.101)
    assert kl.next_coefficient(0.1, 60.0, 6.0) == pytest.approx(0.102)


def test_the_score_is_the_last_tokens():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    penalty = torch.tensor([[0.1, -0.2, 0.3], [0.4, torch.nan, torch.inf]])
    rewards = ppo.token_rewards(torch.tensor([2.0, -1.0]), penalty, mask)
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, 0.2, 1.7], [-1.4, 0.0, 0.0]]))


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 3.0, 6.0])  # squares about 3: 4, 1, 0, 9
    assert ppo.explained_variance(returns, returns) == 1.0
    assert ppo.explained_variance(torch.full((4,), 9.0), returns) == 0.0  # an offset leaves no variance
    # residuals 1, 0, 0, 0: squares about 1/4 are 0.75, of 14
    assert ppo.explained_variance(returns - torch.tensor([1.0, 0, 0, 0]), returns) == pytest.approx(1 - 0.75 / 14)


def test_running_moments_are_those_of_all_values():
    rng = np.random.default_rng(0)
    parts = [rng.normal(1e4, 2, size) for size in (1, 5, 40)]
    moments = Moments()
    for part in parts:
        moments = moments.add(part)
    everything = np.concatenate(parts)
    assert (moments.count, moments.mean) == (46, pytest.approx(everything.mean(), rel=1e-14))
    expected = (parts[2] - everything.mean()) / everything.std()
    np.testing.assert_allclose(moments.standardise(parts[2]), expected, rtol=1e-6, atol=1e-6)
    assert Moments().add(np.full(3, 7.0)).standardise(np.full(3, 7.0)).tolist() == [0, 0, 0]


def test_gradients_against_finite_differences():
    """Of policy loss with dual clip, entropy-free KL loss and value loss together, away from the corners."""
    torch.manual_seed(1)
    x = torch.randn(2, 40, dtype=torch.float64)
    old, advantages, reference, old_values, returns = torch.randn(5, 40, dtype=torch.float64)

    def total(x: torch.Tensor) -> torch.Tensor:
        policy = ppo.policy_loss(x[0], old, advantages, 0.2, 3.0, 1.5).loss
        value, _ = ppo.value_loss(x[1], old_values, returns, 0.5)
        return (policy + 0.3 * kl.estimate(x[0], reference, "k3", 20.0) + value).sum()

    assert torch.autograd.gradcheck(total, x.requires_grad_(), eps=1e-6, atol=1e-6)
