"""TIES, redone by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfuse.core.errors import ConfigError
from fedfuse.rules import fuse_uploads
from fedfuse.rules.rule import Source
from fedfuse.rules.ties import Ties, disjoint_mean

ALL = Ties(keep_fraction=1.0)


def ties(rows: list[list[float]], rule: Ties = ALL, weights: list[float] | None = None) -> list[float]:
    uploads = [{"model/w": torch.tensor(row, dtype=torch.float64)} for row in rows]
    base = {"w": torch.zeros(len(rows[0]), dtype=torch.float64)}
    return list(fuse_uploads(uploads, rule, weights, base=base)["w"].tolist())


def test_trimming_keeps_the_largest_changes_of_each_client() -> None:
    # Two of five are kept: 4 and -5 of the first, 3 and 2 of the second.
    rule = Ties(keep_fraction=0.4)
    rows = [[1.0, -2.0, 4.0, -5.0, 0.5], [3.0, 2.0, 1.0, -1.0, 0.0]]
    assert ties(rows, rule) == [3.0, 2.0, 4.0, -5.0, 0.0]


def test_equal_magnitudes_are_kept_together() -> None:
    kept = Ties(keep_fraction=0.25).prepare(torch.tensor([1.0, -2.0, 2.0, 0.0]).double(), Source("w", 0, 1))
    assert kept.tolist() == [0.0, -2.0, 2.0, 0.0]


def test_the_sign_is_elected_by_mass_and_only_those_who_agree_are_averaged() -> None:
    assert ties([[4.0], [2.0], [-5.0]]) == [3.0]
    assert ties([[4.0], [2.0], [-7.0]]) == pytest.approx([-7.0])
    assert ties([[4.0], [0.0], [-1.0]]) == [4.0]


def test_weights_count_in_the_election_and_in_the_mean() -> None:
    # 1/2 * 1 + 1/4 * 5 - 1/4 * 4 > 0, and (1/2 * 1 + 1/4 * 5) / (3/4) = 7/3.
    assert ties([[1.0], [5.0], [-4.0]], weights=[2, 1, 1]) == pytest.approx([7 / 3])


def test_what_cancels_stays_as_it_was() -> None:
    assert ties([[3.0], [-3.0]]) == [0.0]


def test_the_scaled_change_is_added_to_the_base() -> None:
    uploads = [{"model/w": torch.tensor([12.0])}, {"model/w": torch.tensor([14.0])}]
    assert fuse_uploads(uploads, Ties(scaling=2.0), base={"w": torch.tensor([10.0])})["w"].tolist() == [16.0]


def test_integers_and_buffers_are_averaged() -> None:
    uploads: list[dict[str, Any]] = [
        {"model/n": torch.tensor(n), "model/var": torch.tensor([v, v]), "model/w": torch.tensor([v, 0.0])}
        for n, v in ((4, 1.0), (7, 3.0))
    ]
    base = {"w": torch.tensor([2.0, 0.0])}
    fused = fuse_uploads(uploads, Ties(), [1, 3], base=base, buffers={"var"})
    assert fused["n"].item() == 6
    assert fused["var"].tolist() == [2.5, 2.5]
    assert fused["w"].tolist() == [3.0, 0.0]


def test_an_empty_tensor() -> None:
    assert ties([[], []]) == []


@pytest.mark.parametrize("keep_fraction", [0.0, 1.5, -0.1])
def test_fractions_that_cannot_be(keep_fraction: float) -> None:
    with pytest.raises(ConfigError) as caught:
        Ties(keep_fraction=keep_fraction)
    assert str(caught.value) == (
        f"keep_fraction is {keep_fraction}\n  where: rule.keep_fraction\n  fix:   give a fraction in (0, 1]"
    )


def test_a_scaling_below_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="scaling is -1"):
        Ties(scaling=-1.0)


NUMBERS = st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3)


@given(st.lists(NUMBERS, min_size=1, max_size=6))
def test_the_result_lies_within_the_values_of_the_elected_sign(rows: list[list[float]]) -> None:
    stack = torch.tensor(rows, dtype=torch.float64)
    fused = disjoint_mean(stack, torch.full((len(rows),), 1 / len(rows), dtype=torch.float64))
    assert bool((fused <= stack.max(0).values.clamp(min=0) + 1e-9).all())
    assert bool((fused >= stack.min(0).values.clamp(max=0) - 1e-9).all())
    assert not bool((torch.sign(fused) * torch.sign(stack.mean(0)) < 0).any())
