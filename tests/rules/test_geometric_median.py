"""The geometric median, redone by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfuse.core.errors import ConfigError
from fedfuse.rules import fuse_uploads
from fedfuse.rules.geometric_median import GeometricMedian


def median(*rows: list[float], weights: list[float] | None = None) -> list[float]:
    uploads = [{"model/w": torch.tensor(row, dtype=torch.float64)} for row in rows]
    return list(fuse_uploads(uploads, GeometricMedian(), weights)["w"].tolist())


def test_on_a_line_it_is_the_median() -> None:
    assert median([1.0], [2.0], [900.0]) == pytest.approx([2.0], abs=1e-4)
    assert median([1.0], [2.0], [3.0], [10.0], [-50.0]) == pytest.approx([2.0], abs=1e-4)


def test_the_point_of_fermat_sees_all_sides_under_120_degrees() -> None:
    # For an equilateral triangle it is the centre; for an angle of 120 degrees and more it is that very corner.
    assert median([0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]) == pytest.approx([0.5, math.sqrt(3) / 6], abs=1e-8)
    assert median([0.0, 0.0], [2.0, 0.1], [-2.0, 0.1]) == pytest.approx([0.0, 0.0], abs=1e-4)
    assert median([-1.0, 0.0], [1.0, 0.0], [0.0, -3.0], [0.0, 2.0]) == pytest.approx([0.0, 0.0], abs=1e-6)


def test_weights_count_and_half_of_them_decide() -> None:
    assert median([0.0], [10.0], weights=[3, 1]) == pytest.approx([0.0], abs=1e-4)
    assert median([0.0, 0.0], [10.0, 0.0], [0.0, 10.0], weights=[6, 2, 3]) == pytest.approx([0.0, 0.0], abs=1e-4)


@pytest.mark.parametrize("distance", [1e2, 1e6, 1e12, 1e30, 1e100, 1e200])
def test_however_far_a_minority_goes_the_others_hold(distance: float) -> None:
    found = median([1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [distance, distance], [distance, -distance])
    assert math.hypot(*found) < 1.5


@given(st.integers(0, 10_000))
def test_no_step_aside_is_better(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    stack = torch.randn(6, 4, generator=g, dtype=torch.float64)
    weights = torch.rand(6, generator=g, dtype=torch.float64) + 0.1
    found = fuse_uploads([{"model/w": row} for row in stack], GeometricMedian(), weights.tolist())["w"]

    def cost(point: torch.Tensor) -> float:
        return float(weights @ (stack - point).norm(dim=1))

    for _ in range(10):
        assert cost(found) <= cost(found + 1e-2 * torch.randn(4, generator=g, dtype=torch.float64)) + 1e-9
    assert cost(found) <= min(cost(row) for row in stack) + 1e-4


def test_identical_models_and_one_client() -> None:
    assert median([1.5, 2.5]) == [1.5, 2.5]
    assert median([1.5, 2.5], [1.5, 2.5], [1.5, 2.5]) == pytest.approx([1.5, 2.5], abs=1e-15)
    assert median([1.0], [1.0], [7.0]) == pytest.approx([1.0], abs=1e-4)


def test_the_whole_model_has_one_median_and_buffers_follow() -> None:
    # Coordinate by coordinate the median of these would be (0, 0); and counters do not decide who is far.
    rows = [
        {"model/a": torch.tensor([a]), "model/b": torch.tensor([b]), "model/steps": torch.tensor(s)}
        for a, b, s in [(1.0, 0.0, 4), (0.0, 1.0, 4), (0.0, 0.0, 4), (0.3, 0.3, 900)]
    ]
    found = fuse_uploads(rows, GeometricMedian())
    assert [found["a"].item(), found["b"].item()] == pytest.approx([0.3, 0.3], abs=1e-2)
    assert found["steps"].item() > 800


def test_settings_that_cannot_be() -> None:
    for setting, value, fix in [
        ("num_iterations", 0, "give at least 1"),
        ("smoothing", 0.0, "give a number above 0"),
        ("tolerance", -1.0, "give a number above 0"),
    ]:
        with pytest.raises(ConfigError) as caught:
            GeometricMedian(**{setting: value})  # type: ignore[arg-type]
        assert str(caught.value) == f"{setting} is {value}\n  where: rule.{setting}\n  fix:   {fix}"
