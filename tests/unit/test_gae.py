"""Advantages by hand and against the plain loop, and what whitening divides by."""

import pytest
import torch

from c2f_ray.losses import gae

# Two responses of 3 and 1 tokens; what lies outside the mask is poison.
MASK = torch.tensor([[True, True, True], [True, False, False]])
REWARDS = torch.tensor([[0.0, 1.0, 2.0], [-1.0, torch.nan, torch.inf]], dtype=torch.float64)
VALUES = torch.tensor([[0.5, 1.0, -1.0], [0.25, torch.inf, torch.nan]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("gamma", "gae_lambda", "expected"),
    [
        # delta: 0 + 0.5 * 1 - 0.5 = 0, 1 + 0.5 * -1 - 1 = -0.5, 2 - -1 = 3; -1 - 0.25
        # with 0.5 * 0.8 = 0.4: 3, -0.5 + 1.2, 0 + 0.28
        (0.5, 0.8, [[0.28, 0.7, 3.0], [-1.25, 0.0, 0.0]]),
        # gamma and lambda 1: the sum of the rewards from here on, minus the value: 3 - 0.5, 3 - 1, 2 + 1
        (1.0, 1.0, [[2.5, 2.0, 3.0], [-1.25, 0.0, 0.0]]),
        # lambda 0: delta itself; with gamma 1: 1 - 0.5, 1 - 1 - 1, 2 + 1
        (1.0, 0.0, [[0.5, -1.0, 3.0], [-1.25, 0.0, 0.0]]),
    ],
)
def test_advantages_by_hand(gamma, gae_lambda, expected):
    found = gae.advantages(REWARDS, VALUES, MASK, gamma, gae_lambda)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 1024, 1025, 2500])  # around a block, and a block of blocks
@pytest.mark.parametrize("discount", [0.95, 0.9999, 1.0, 0.0])
def test_blocks_equal_the_loop(num_tokens, discount):
    """Blocks in float32 come closer to the loop in float64 than the loop in float32 may be: 3e-6 at 2500 tokens."""
    torch.manual_seed(num_tokens)
    values = torch.randn(3, num_tokens)
    expected, total = torch.zeros(3, num_tokens, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for t in reversed(range(num_tokens)):
        total = values[:, t] + discount * total
        expected[:, t] = total
    found = gae.discounted_from_here_on(values, discount)
    assert (found - expected).norm() / expected.norm() < 5e-7
    found = gae.discounted_from_here_on(values.double(), discount)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_more_padding_changes_nothing():
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 2, 40, dtype=torch.float64)
    mask = torch.arange(40) < torch.tensor([[40], [7]])
    poison = torch.full((2, 60), torch.nan, dtype=torch.float64)
    padded = [torch.cat([tensor, poison], 1) for tensor in (rewards, values)]
    longer = gae.advantages(*padded, torch.arange(100) < torch.tensor([[40], [7]]), 0.99, 0.9)
    torch.testing.assert_close(longer[:, :40], gae.advantages(rewards, values, mask, 0.99, 0.9), rtol=1e-14, atol=0)
    assert not longer[:, 40:].any()


def test_whitening_takes_the_mean_in_float64_and_gives_0_for_one_token():
    """float32 values near 10,000 with a deviation of 0.01: a mean rounded to float32 would be off by up to 0.0005."""
    values = 1e4 + 0.01 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whitened = gae.whiten(values, "unbiased").double()
    exact = values.double()
    expected = (exact - exact.mean()) / (exact.var() + 1e-8).sqrt()
    torch.testing.assert_close(whitened, expected, rtol=1e-6, atol=1e-6)
    assert gae.whiten(torch.tensor([3.0]), "unbiased").tolist() == [0.0]
    assert gae.whiten(torch.tensor([3.0]), "biased").tolist() == [0.0]


def test_whitening_by_hand():
    values = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)  # mean 3, squares 4 + 1 + 9 = 14
    assert gae.whiten(values, "none") is values
    unbiased = torch.tensor([-2.0, -1.0, 3.0], dtype=torch.float64) / (7.0 + 1e-8) ** 0.5
    torch.testing.assert_close(gae.whiten(values, "unbiased"), unbiased, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        gae.whiten(values, "biased"), unbiased * ((7.0 + 1e-8) / (14 / 3 + 1e-8)) ** 0.5, rtol=1e-14, atol=0
    )
