"""Adaptive server steps, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fedfuse.ops.adaptive import AdaptiveStep


def step(kind: str, **changed: float) -> AdaptiveStep:
    facts = {"learning_rate": 0.1, "first_decay": 0.9, "second_decay": 0.75, "floor": 0.5, **changed}
    return AdaptiveStep(kind=kind, **facts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "second"),
    [
        ("adam", 0.75 * 4 + 0.25 * 9),
        ("adagrad", 4 + 9),
        # The squared change, 9, is above the second moment, 4, so Yogi adds a quarter of it.
        ("yogi", 4 + 0.25 * 9),
    ],
)
def test_one_step_by_hand(kind: str, second: float) -> None:
    moved, first, found = step(kind)(torch.tensor(3.0), torch.tensor(1.0), torch.tensor(4.0))
    assert first.item() == pytest.approx(0.9 * 1 + 0.1 * 3)
    assert found.item() == pytest.approx(second)
    assert moved.item() == pytest.approx(0.1 * 1.2 / (math.sqrt(second) + 0.5))


def test_yogi_lets_a_second_moment_fall_by_the_squared_change_only() -> None:
    _, _, second = step("yogi")(torch.tensor(1.0), torch.tensor(0.0), torch.tensor(4.0))
    assert second.item() == pytest.approx(4 - 0.25 * 1)
