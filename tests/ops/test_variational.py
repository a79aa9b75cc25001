"""The terms of the evidence lower bound, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fedfuse.ops.variational import gaussian_kl, reconstruction_loss, truncated_normal


def test_the_divergence_of_the_prior_from_itself_is_zero() -> None:
    assert gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0.0, 0.0]


def test_the_divergence_by_hand_and_by_torch() -> None:
    # Mean 1, variance e: (1 + e - 1 - 1) / 2.
    assert gaussian_kl(torch.ones(1, 1), torch.ones(1, 1)).item() == pytest.approx((math.e - 1) / 2)
    mean, log_variance = torch.randn(4, 3), torch.randn(4, 3)
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    wanted = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(gaussian_kl(mean, log_variance), wanted)


def test_pixels_have_a_bernoulli_likelihood_and_numbers_a_gaussian_one() -> None:
    # A logit of 0 says one half: each of three pixels costs log 2, whatever it is.
    zero, target = torch.zeros(1, 1, 1, 3), torch.tensor([[[[0.0, 1.0, 0.3]]]])
    assert reconstruction_loss(zero, target, is_pixels=True).item() == pytest.approx(3 * math.log(2))
    assert reconstruction_loss(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), is_pixels=False).item() == 12.5


def test_truncated_numbers_stay_in_their_bound_and_are_the_same_every_time() -> None:
    first, second = (truncated_normal((5000, 2), 1.5, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, second)
    assert 1.4 < float(first.abs().max()) <= 1.5
    # The variance of a standard normal cut at 1.5 is 1 - 2 * 1.5 * phi(1.5) / (2 Phi(1.5) - 1).
    density, mass = math.exp(-1.125) / math.sqrt(2 * math.pi), math.erf(1.5 / math.sqrt(2))
    assert float(first.var()) == pytest.approx(1 - 3 * density / mass, abs=0.03)
