"""Mixtures of Gaussians, and diagonal moments."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfuse.core.errors import DataError
from fedfuse.ops.mixtures import Mixture, covariance_size, diagonal_moments, draw_mixture, fit_mixture, pool_diagonal
from fedfuse.ops.moments import unpack_symmetric

TRIANGLE = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 6.0]])


def test_one_component_is_the_mean_and_the_covariance() -> None:
    # Around the mean (1, 2): (-1, -2), (2, -2), (-1, 4). Squares 6 and 24, products 2 - 4 - 4 = -6; all over 3.
    spherical = fit_mixture(TRIANGLE, 1, "spherical", seed=0)
    assert spherical.means.tolist() == [[1.0, 2.0]]
    assert spherical.covariances.tolist() == [5.0]
    assert fit_mixture(TRIANGLE, 1, "diagonal", seed=0).covariances.tolist() == [[2.0, 8.0]]
    assert fit_mixture(TRIANGLE, 1, "full", seed=0).covariances.tolist() == [[2.0, -2.0, 8.0]]


@pytest.mark.parametrize("kind", ["spherical", "diagonal", "full"])
def test_two_clumps_are_found_and_drawn_again(kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(90, 2, generator=draw) * 0.1 - 5, torch.randn(30, 2, generator=draw) * 0.1 + 5])
    found = fit_mixture(x, 2, kind, seed=1)
    order = found.means[:, 0].argsort()
    torch.testing.assert_close(found.weights[order], torch.tensor([0.75, 0.25], dtype=torch.float64), atol=1e-6, rtol=0)
    again = fit_mixture(x, 2, kind, seed=1)
    assert torch.equal(found.means, again.means)
    drawn = draw_mixture(found, 4000, kind, torch.Generator().manual_seed(2))
    assert drawn.dtype == torch.float32
    assert float((drawn[:, 0] < 0).float().mean()) == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(drawn.mean(0), x.mean(0), atol=0.3, rtol=0)


@pytest.mark.parametrize("kind", ["spherical", "diagonal", "full"])
def test_never_more_components_than_examples(kind: str) -> None:
    two = fit_mixture(TRIANGLE[:2], 3, kind, seed=0)
    assert (two.weights > 0).tolist() == [True, True, False]
    one = fit_mixture(TRIANGLE[1:2], 3, kind, seed=0)
    assert one.weights.tolist() == [1.0, 0.0, 0.0]
    assert one.covariances.abs().max() == 0
    assert torch.equal(draw_mixture(one, 5, kind, torch.Generator()), TRIANGLE[1:2].expand(5, 2))
    equal = fit_mixture(TRIANGLE[1:2].expand(6, 2), 2, kind, seed=0)
    assert torch.isfinite(equal.covariances).all()


def test_draws_have_the_moments_of_the_mixture() -> None:
    packed = torch.tensor([[2.0, -2.0, 8.0]], dtype=torch.float64)
    mixture = Mixture(torch.ones(1), torch.tensor([[1.0, 2.0]]), packed)
    drawn = draw_mixture(mixture, 20000, "full", torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(drawn.T.cov(), unpack_symmetric(packed, 2)[0], atol=0.2, rtol=0)
    flat = Mixture(torch.ones(1), torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 8.0]]))
    drawn = draw_mixture(flat, 20000, "diagonal", torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(drawn.T.cov().diagonal(), torch.tensor([2.0, 8.0]).double(), atol=0.2, rtol=0)
    round_ = Mixture(torch.ones(1), torch.zeros(1, 2), torch.tensor([4.0]))
    drawn = draw_mixture(round_, 20000, "spherical", torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(drawn.std(0), torch.tensor([2.0, 2.0]).double(), atol=0.05, rtol=0)


def test_rounded_covariances_that_are_no_longer_positive_can_be_drawn_from() -> None:
    broken = Mixture(torch.ones(1), torch.zeros(1, 2), torch.tensor([[1.0, 1.1, 1.0]]).half())
    assert torch.isfinite(draw_mixture(broken, 10, "full", torch.Generator())).all()
    assert covariance_size("full", 2) == (3,)


@given(st.lists(st.integers(0, 30), max_size=5))
def test_pooled_diagonal_moments_are_those_of_the_pooled_data(cuts: list[int]) -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 4, generator=draw) + 3, torch.randint(0, 3, (30,), generator=draw)
    edges = [0, *sorted(cuts), 30]
    parts = [diagonal_moments(x[a:b], y[a:b], 4) for a, b in itertools.pairwise(edges)]
    pooled, wanted = pool_diagonal(parts), diagonal_moments(x, y, 4)
    assert torch.equal(pooled.counts, wanted.counts)
    torch.testing.assert_close(pooled.means, wanted.means, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pooled.squares, wanted.squares, rtol=1e-12, atol=1e-12)


def test_no_moments_are_refused() -> None:
    with pytest.raises(DataError) as caught:
        pool_diagonal([])
    assert str(caught.value) == "there are no moments to pool\n  fix:   ask at least one client"
