"""The arc between models, redone by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedfuse.rules import fuse_uploads
from fedfuse.rules.slerp import Slerp, arc


def slerp(*rows: list[float], weights: list[float] | None = None) -> list[float]:
    uploads = [{"model/w": torch.tensor(row, dtype=torch.float64)} for row in rows]
    return list(fuse_uploads(uploads, Slerp(), weights)["w"].tolist())


@pytest.mark.parametrize("share", [0.0, 0.25, 1 / 3, 0.5, 1.0])
def test_two_directions_are_joined_on_the_circle(share: float) -> None:
    angle = share * math.pi / 2
    wanted = [math.cos(angle), math.sin(angle)]
    assert slerp([1.0, 0.0], [0.0, 1.0], weights=[1 - share, share]) == pytest.approx(wanted, abs=1e-12)


def test_three_on_a_circle_meet_at_the_weighted_mean_angle() -> None:
    angles, weights = (0.1, 0.5, 1.2), [1.0, 2.0, 1.0]
    mean = (0.1 + 2 * 0.5 + 1.2) / 4
    found = slerp(*([math.cos(a), math.sin(a)] for a in angles), weights=weights)
    assert found == pytest.approx([math.cos(mean), math.sin(mean)])


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([[1.0, 2.0], [3.0, 6.0]], [2.0, 4.0]),
        ([[1.0, 2.0], [-1.0, -2.0]], [0.0, 0.0]),
        ([[0.0, 0.0], [3.0, 1.0]], [1.5, 0.5]),
        ([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]),
        ([[3.0], [1.0]], [2.0]),
    ],
)
def test_parallel_opposite_and_zero_ones_meet_on_the_straight_line(
    rows: list[list[float]], wanted: list[float]
) -> None:
    assert slerp(*rows) == pytest.approx(wanted)


def test_a_client_without_weight_changes_nothing() -> None:
    assert slerp([1.0, 0.0], [0.0, 5.0], weights=[1, 0]) == [1.0, 0.0]
    assert slerp([0.0, 5.0], [1.0, 0.0], weights=[0, 1]) == pytest.approx([1.0, 0.0])


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_vectors_of_one_length_keep_it(seed: int, fraction: float) -> None:
    a, b = _unit(seed), _unit(seed + 1)
    assert float(arc(a, b, fraction).norm()) == pytest.approx(1.0, abs=1e-9)


def _unit(seed: int) -> Tensor:
    v = torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(v, dim=0)
