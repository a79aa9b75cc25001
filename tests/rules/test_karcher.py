"""The mean on the sphere, redone by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedfuse.core.errors import ConfigError
from fedfuse.rules import fuse_uploads
from fedfuse.rules.karcher import Karcher
from fedfuse.rules.slerp import Slerp


def karcher(*rows: list[float], weights: list[float] | None = None) -> list[float]:
    uploads = [{"model/w": torch.tensor(row, dtype=torch.float64)} for row in rows]
    return list(fuse_uploads(uploads, Karcher(), weights)["w"].tolist())


def test_on_a_circle_angles_and_lengths_are_averaged() -> None:
    angles, lengths, weights = (0.1, 0.5, 1.3), (1.0, 2.0, 5.0), [1.0, 2.0, 1.0]
    angle, length = (0.1 + 2 * 0.5 + 1.3) / 4, (1 + 2 * 2 + 5) / 4
    rows = [[n * math.cos(a), n * math.sin(a)] for n, a in zip(lengths, angles, strict=True)]
    assert karcher(*rows, weights=weights) == pytest.approx([length * math.cos(angle), length * math.sin(angle)])


def test_two_models_of_one_length_meet_as_in_slerp() -> None:
    rows = torch.randn(2, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = rows / rows.norm(dim=1, keepdim=True)
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    torch.testing.assert_close(Karcher().fuse(rows, weights), Slerp().fuse(rows, weights))


@given(st.integers(0, 10_000), st.integers(2, 6))
def test_the_pulls_of_all_clients_cancel_at_the_mean(seed: int, num_clients: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(8, generator=generator, dtype=torch.float64)
    stack = 2 * centre / centre.norm() + 0.5 * torch.randn(num_clients, 8, generator=generator, dtype=torch.float64)
    weights = torch.rand(num_clients, generator=generator, dtype=torch.float64) + 0.1
    weights = weights / weights.sum()
    fused = Karcher().fuse(stack, weights)
    assert float(fused.norm()) == pytest.approx(float(weights @ stack.norm(dim=1)))
    assert float(_pull(stack, weights, fused / fused.norm()).norm()) < 1e-7


def _pull(stack: Tensor, weights: Tensor, point: Tensor) -> Tensor:
    units = stack / stack.norm(dim=1, keepdim=True)
    across = units - (units @ point)[:, None] * point
    angles = torch.atan2(across.norm(dim=1), units @ point)
    pulls: Tensor = across / across.norm(dim=1, keepdim=True).clamp(min=1e-300) * angles[:, None]
    return weights @ pulls


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([[1.0, 2.0], [3.0, 6.0]], [2.0, 4.0]),
        ([[1.0, 2.0], [-1.0, -2.0]], [0.0, 0.0]),
        ([[0.0, 0.0], [3.0, 0.0]], [1.5, 0.0]),
        ([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]),
        ([[3.0], [1.0]], [2.0]),
        ([[5.0, 5.0]], [5.0, 5.0]),
    ],
)
def test_parallel_opposite_and_zero_ones(rows: list[list[float]], wanted: list[float]) -> None:
    assert karcher(*rows) == pytest.approx(wanted)


def test_the_order_of_the_clients_does_not_matter() -> None:
    stack = torch.randn(5, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.3, 0.1], dtype=torch.float64)
    torch.testing.assert_close(Karcher().fuse(stack.flip(0), weights.flip(0)), Karcher().fuse(stack, weights))


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError) as caught:
        Karcher(num_iterations=0)
    assert str(caught.value) == "num_iterations is 0\n  where: rule.num_iterations\n  fix:   give at least 1"
    with pytest.raises(ConfigError) as caught:
        Karcher(tolerance=0.0)
    assert str(caught.value) == "tolerance is 0.0\n  where: rule.tolerance\n  fix:   give a number above 0"
