"""Coordinates along random directions, against their expectations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfuse.core.seeding import Rng
from fedfuse.ops import random_projection
from fedfuse.ops.random_projection import project, rebuild, shares_of

X = torch.linspace(-1, 2, 20, dtype=torch.float64)


def there_and_back(number: int, num_coordinates: int, *, has_least_error: bool = False) -> torch.Tensor:
    coordinates = project(X, num_coordinates, Rng(0).torch(number))
    return rebuild(coordinates, len(X), Rng(0).torch(number), has_least_error=has_least_error)


def test_coordinates_are_inner_products_with_signs() -> None:
    drawn = torch.randint(0, 256, (3, 1), generator=Rng(0).torch("a"), dtype=torch.uint8)
    signs = torch.tensor([[2 * (int(byte) >> bit & 1) - 1 for bit in range(5)] for byte in drawn]).double()
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])

    assert project(x, 3, Rng(0).torch("a")).tolist() == (signs @ x.double()).tolist()
    found = rebuild(torch.tensor([1.0, -2.0, 0.5]), 5, Rng(0).torch("a"))
    wanted = (signs[0] - 2 * signs[1] + 0.5 * signs[2]) / 3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-15)


def test_what_is_rebuilt_is_right_in_the_mean_and_its_error_is_the_formula() -> None:
    num, rounds = 30, 4000
    found = torch.stack([there_and_back(number, num) for number in range(rounds)])

    # Variance of an entry: (|x|^2 - x_i^2) / K.
    spread = ((X.square().sum() - X.square()) / num / rounds).sqrt()
    assert bool(((found.mean(0) - X).abs() < 5 * spread).all())
    error = (found - X).square().sum(1).mean().item()
    assert error == pytest.approx(X.square().sum().item() * (len(X) - 1) / num, rel=0.05)


def test_the_least_error_is_less_and_no_other_factor_is_better() -> None:
    num = 30
    found = torch.stack([there_and_back(number, num) for number in range(2000)])
    shorter = torch.stack([there_and_back(number, num, has_least_error=True) for number in range(5)])

    factor = num / (num + len(X) - 1)
    torch.testing.assert_close(shorter, factor * found[:5])
    errors = {f: (f * found - X).square().sum(1).mean().item() for f in (0.9 * factor, factor, 1.1 * factor, 1.0)}
    assert min(errors, key=errors.__getitem__) == factor


def test_one_entry_comes_back_whole() -> None:
    assert rebuild(project(torch.tensor([-7.5]), 1, Rng(0).torch()), 1, Rng(0).torch()).tolist() == [-7.5]


def test_how_much_is_in_memory_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = project(X, 50, Rng(0).torch("a"))
    back = rebuild(whole, len(X), Rng(0).torch("a"))
    monkeypatch.setattr(random_projection, "_ROWS_OF", 7 * len(X))

    torch.testing.assert_close(project(X, 50, Rng(0).torch("a")), whole, rtol=0, atol=1e-14)
    torch.testing.assert_close(rebuild(whole, len(X), Rng(0).torch("a")), back, rtol=0, atol=1e-14)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=20), st.integers(0, 200))
def test_shares_add_up_and_nobody_goes_without(weights: list[float], more: int) -> None:
    total = len(weights) + more
    found = shares_of(torch.tensor(weights), total)

    assert int(found.sum()) == total
    assert int(found.min()) >= 1
    if sum(weights) > 0:
        wanted = [1 + more * weight / math.fsum(weights) for weight in weights]
        assert all(abs(have - want) <= 1 + 1e-4 * total for have, want in zip(found.tolist(), wanted, strict=True))
