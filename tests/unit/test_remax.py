"""ReMax's returns in both published conventions, and the gradient of its loss."""

import pytest
import torch

from c2f_ray.losses import remax

# Two samples of 3 and 1 tokens; what lies outside the mask is poison.
MASK = torch.tensor([[True, True, True], [True, False, False]])
KL = torch.tensor([[0.1, -0.2, 0.3], [0.4, torch.nan, torch.inf]], dtype=torch.float64)
ADVANTAGES = torch.tensor([0.5, -1.0], dtype=torch.float64)


def test_the_clip_comes_after_the_subtraction():
    reward = torch.tensor([3.0, 0.25, -9.0])
    greedy = torch.tensor([2.5, 0.5, 4.0])
    # Clipping each to +-1 before would give 0, -0.25, -2.
    assert remax.advantage(reward, greedy, 1.0).tolist() == [0.5, -0.25, -1.0]


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_full_step_by_hand(gamma):
    # 0.5 - 0.1 * (0.1 - 0.2 + 0.3), 0.5 - 0.1 * (-0.2 + 0.3), 0.5 - 0.1 * 0.3; -1 - 0.1 * 0.4; gamma plays no part
    returns = remax.returns(ADVANTAGES, KL, MASK, "full_step", 0.1, gamma)
    expected = torch.tensor([[0.48, 0.49, 0.47], [-1.04, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(returns, expected, rtol=0, atol=1e-15)


def test_one_step_by_hand():
    # T = 3: 0.5^3 * 0.5 - 0.01, 0.5^2 * 0.5 + 0.02, 0.5 * 0.5 - 0.03; T = 1: 0.5 * -1 - 0.04
    returns = remax.returns(ADVANTAGES, KL, MASK, "one_step", 0.1, 0.5)
    expected = torch.tensor([[0.0525, 0.145, 0.22], [-0.54, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(returns, expected, rtol=0, atol=1e-15)


def test_loss_by_hand():
    returns = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, 0.0]])
    logprobs = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, torch.nan, torch.nan]], requires_grad=True)
    # -(-0.5 + 2 - 1 - 3) = 2.5 over the 4 tokens here; over 10 where other micro-batches have 6 more
    assert remax.loss(returns, logprobs, MASK, 4).item() == pytest.approx(0.625)
    loss = remax.loss(returns, logprobs, MASK, 10)
    assert loss.item() == pytest.approx(0.25)
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [pytest.approx([-0.05, 0.1, -0.2]), pytest.approx([-0.1, 0.0, 0.0])]


@pytest.mark.parametrize("kl_penalty", ["full_step", "one_step"])
def test_gradient_against_finite_differences(kl_penalty):
    """The KL enters the returns as a number: the policy gradient is that of -sum(return * logprob) alone."""
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(5, (2, 3, 1))
    reference = torch.randn(2, 3, dtype=torch.float64)

    def logprobs():
        return logits.log_softmax(-1).gather(-1, tokens).squeeze(-1)

    def returns(logprobs):
        return remax.returns(ADVANTAGES, logprobs - reference, MASK, kl_penalty, 0.3, 0.9)

    remax.loss(returns(logprobs()), logprobs(), MASK, 4).backward()  # the returns are given with their graph
    with torch.no_grad():
        fixed, step = returns(logprobs()), 1e-6
        numeric = torch.zeros_like(logits)
        flat, out = logits.view(-1), numeric.view(-1)
        for i in range(flat.numel()):
            for sign in (1, -1):
                flat[i] += sign * step
                out[i] += sign * remax.loss(fixed, logprobs(), MASK, 4) / (2 * step)
                flat[i] -= sign * step
    torch.testing.assert_close(logits.grad, numeric, rtol=1e-7, atol=1e-9)
