"""The trimmed mean, redone by hand."""

from __future__ import annotations

import pytest
import torch

from fedfuse.core.errors import ConfigError
from fedfuse.rules import fuse_uploads
from fedfuse.rules.trimmed_mean import TrimmedMean


def fuse(values: list[float], trim_fraction: float) -> float:
    uploads = [{"model/w": torch.tensor([value], dtype=torch.float64)} for value in values]
    return float(fuse_uploads(uploads, TrimmedMean(trim_fraction=trim_fraction))["w"])


@pytest.mark.parametrize(
    ("values", "trim_fraction", "wanted"),
    [
        ([0.0, 1.0, 5.0], 0.0, 2.0),
        ([9.0, 1.0, 2.0, 3.0, -9.0], 0.2, 2.0),
        ([9.0, 1.0, 2.0, 3.0, -9.0], 0.19, 1.2),
        ([9.0, 1.0, 2.0, 3.0, -9.0], 0.4, 2.0),
        ([9.0, 1.0], 0.49, 5.0),
        ([float(v) for v in range(10)], 0.3, 4.5),
    ],
)
def test_the_mean_of_the_middle(values: list[float], trim_fraction: float, wanted: float) -> None:
    assert fuse(values, trim_fraction) == pytest.approx(wanted, abs=1e-15)


def test_a_product_that_is_just_below_a_whole_number_of_clients_counts_as_whole() -> None:
    # 0.29 * 100 is 28.999999999999996 in floating point.
    values = [0.0] * 29 + [1.0] * 42 + [1000.0] * 29
    assert fuse(values, 0.29) == 1.0


def test_some_client_is_always_left() -> None:
    assert fuse([1.0, 3.0], 0.5 - 1e-12) == 2.0


@pytest.mark.parametrize("trim_fraction", [-0.1, 0.5, 1.0, float("nan")])
def test_a_fraction_that_cannot_be(trim_fraction: float) -> None:
    with pytest.raises(ConfigError) as caught:
        TrimmedMean(trim_fraction=trim_fraction)
    assert str(caught.value) == (
        f"trim_fraction is {trim_fraction}\n  where: rule.trim_fraction\n  fix:   give a fraction in [0, 0.5)"
    )
