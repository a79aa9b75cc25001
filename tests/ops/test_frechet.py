from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse.core.errors import DataError
from fedfuse.ops.frechet import frechet_distance


def test_one_feature_by_hand() -> None:
    # Means 1 and 10, variances 2 and 8: 81 + 2 + 8 - 2 sqrt(16).
    first, second = torch.tensor([[0.0], [2.0]]), torch.tensor([[8.0], [12.0]])
    assert frechet_distance(first, second) == pytest.approx(81 + 2 + 8 - 8, abs=1e-12)


def test_covariances_that_commute_by_hand() -> None:
    # Corners of rectangles with sides 2a and 2b: variances 4/3 a^2 and 4/3 b^2, no covariance.
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    first, second = corners * torch.tensor([1.0, 2.0]), corners * torch.tensor([3.0, 1.0]) + torch.tensor([0.0, 5.0])
    # The difference of the deviations, squared, along each axis, and that of the means.
    assert frechet_distance(first, second) == pytest.approx(4 / 3 * ((1 - 3) ** 2 + (2 - 1) ** 2) + 25, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 6), st.integers(1, 8))
def test_it_is_a_distance(seed: int, num_rows: int, width: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(num_rows, width, generator=draw) for _ in range(2))
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-6, abs=1e-6)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(first, first + 3) == pytest.approx(9 * width, rel=1e-5)


def test_it_is_what_roots_of_matrices_give() -> None:
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(50, 4, generator=draw).double(), torch.randn(40, 4, generator=draw).double() * 2 + 1
    one, two = first.T.cov(), second.T.cov()
    # The eigenvalues of the product are those of the symmetric form.
    shared = torch.linalg.eigvals(one @ two).real.sqrt().sum()
    wanted = (first.mean(0) - second.mean(0)).square().sum() + one.trace() + two.trace() - 2 * shared
    assert frechet_distance(first, second) == pytest.approx(wanted.item(), rel=1e-12)


def test_what_cannot_be_compared() -> None:
    with pytest.raises(DataError) as error:
        frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))
    assert error.value.what == "features of shape (1, 3) and (5, 3) cannot be compared"
    with pytest.raises(DataError):
        frechet_distance(torch.zeros(4, 2), torch.zeros(4, 3))
