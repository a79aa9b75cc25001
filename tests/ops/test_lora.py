"""Fusing low-rank changes: numbers that can be redone by hand, and exactness in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse.ops import lora
from fedfuse.ops.lora import Factors
from fedfuse.rules.adapters.average import Average
from fedfuse.rules.adapters.fedex import FedEx
from fedfuse.rules.adapters.flora import Flora
from fedfuse.rules.adapters.merge import Merge
from fedfuse.rules.adapters.rule import AdapterRule
from fedfuse.rules.adapters.svd import Svd


def factors(height: int, width: int, rank: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(height, rank, dtype=torch.float64, generator=generator)
    return Factors(left, torch.randn(rank, width, dtype=torch.float64, generator=generator))


@st.composite
def adapters(draw: st.DrawFn) -> tuple[list[Factors], list[float]]:
    """Some adapters of one weight, of ranks below its dimensions, with weights that sum to 1."""
    height, width = draw(st.integers(2, 12)), draw(st.integers(2, 12))
    ranks = draw(st.lists(st.integers(0, min(height, width) - 1), min_size=1, max_size=5))
    parts = [factors(height, width, rank, seed) for seed, rank in enumerate(ranks)]
    raw = draw(st.lists(st.integers(0, 9), min_size=len(ranks), max_size=len(ranks)))
    total = sum(raw)
    return parts, [value / total for value in raw] if total else [1 / len(ranks)] * len(ranks)


def target(parts: list[Factors], weights: list[float]) -> torch.Tensor:
    return sum(
        (weight * part.product() for part, weight in zip(parts, weights, strict=True)), torch.zeros(parts[0].shape)
    )


# --- closed forms


def test_scaling_of_plain_and_rank_stabilised_adapters() -> None:
    assert lora.scaling(16, 8, is_rank_stabilised=False) == 2.0
    assert lora.scaling(16, 4, is_rank_stabilised=True) == 8.0


def test_stacking_puts_factors_side_by_side() -> None:
    one = Factors(torch.tensor([[1.0], [0.0]]).double(), torch.tensor([[2.0, 0.0]]).double())
    two = Factors(torch.tensor([[0.0], [1.0]]).double(), torch.tensor([[0.0, 4.0]]).double())
    found = lora.stacked([one, two], [0.5, 0.25])
    assert found.left.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert found.right.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert lora.stacked([one, two], [1.0, 0.0]).rank == 1
    assert lora.stacked([one, two], [0.0, 0.0]).product().tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_averaging_factors_has_the_cross_terms_that_the_mean_of_products_has_not() -> None:
    one = Factors(torch.tensor([[2.0]]).double(), torch.tensor([[3.0]]).double())
    two = Factors(torch.tensor([[4.0]]).double(), torch.tensor([[-1.0]]).double())
    # (2 + 4) / 2 x (3 - 1) / 2 = 3, and not (6 - 4) / 2 = 1.
    assert lora.averaged([one, two], [0.5, 0.5]).product().item() == 3.0
    assert lora.stacked([one, two], [0.5, 0.5]).product().item() == 1.0


def test_averaging_fills_smaller_ranks_up_with_zeros() -> None:
    small, large = factors(3, 4, 1, 0), factors(3, 4, 2, 1)
    found = lora.averaged([small, large], [0.5, 0.5])
    assert found.rank == 2
    assert found.left[:, 1].equal(large.left[:, 1] / 2)
    assert found.right[0].equal((small.right[0] + large.right[0]) / 2)


def test_a_change_that_one_adapter_alone_makes_keeps_its_weight_in_the_average() -> None:
    one, nothing = factors(3, 4, 2, 0), factors(3, 4, 0, 0)
    torch.testing.assert_close(lora.averaged([nothing, one], [0.75, 0.25]).product(), 0.25 * one.product())


def test_truncating_keeps_the_largest_singular_values() -> None:
    wide = Factors(torch.eye(4).double()[:, :3], torch.diag(torch.tensor([5.0, 3.0, 2.0])).double())
    found = lora.truncated(wide, 2)
    torch.testing.assert_close(torch.linalg.svdvals(found.product())[:3].tolist(), [5.0, 3.0, 0.0])
    # What is lost is the third singular value.
    assert lora.distance(wide, found) == pytest.approx(2.0, rel=1e-12)
    # Both factors carry the same share of the size.
    assert found.left.norm().item() == pytest.approx(found.right.norm().item(), rel=1e-12)


def test_a_change_that_is_zero_beside_its_factors_has_rank_zero() -> None:
    one = factors(6, 5, 2, 0)
    assert lora.compressed(Factors(torch.cat([one.left, one.left], 1), torch.cat([one.right, -one.right]))).rank == 0
    doubled = lora.compressed(Factors(torch.cat([one.left, one.left], 1), torch.cat([one.right, one.right])))
    assert doubled.rank == 2
    torch.testing.assert_close(doubled.product(), 2 * one.product())


@pytest.mark.parametrize(("height", "width"), [(40, 30), (700, 600)])
def test_the_leading_part_of_a_full_matrix(height: int, width: int) -> None:
    u = torch.linalg.qr(factors(height, 1, 6, 0).left).Q
    v = torch.linalg.qr(factors(width, 1, 6, 1).left).Q
    values = torch.tensor([9.0, 8.0, 4.0, 2.0, 1.0, 0.5]).double()
    matrix = (u * values) @ v.T
    found = lora.truncated_matrix(matrix, 3, torch.Generator().manual_seed(0))
    assert found.rank == 3
    assert (matrix - found.product()).norm().item() == pytest.approx(math.sqrt(4 + 1 + 0.25), rel=1e-9)
    again = lora.truncated_matrix(matrix, 3, torch.Generator().manual_seed(0))
    assert found.left.equal(again.left)


def test_norms_of_differences_keep_their_digits_where_nearly_everything_cancels() -> None:
    one = factors(50, 40, 4, 0)
    other = Factors(one.left, one.right + 1e-12 * factors(50, 40, 4, 1).right)
    exact = (one.left @ (one.right - other.right)).norm().item()
    assert lora.distance(one, other) == pytest.approx(exact, rel=1e-6)
    rebuilt = lora.truncated(other, 4)
    assert lora.distance(one, rebuilt) < 1e-10
    assert lora.distance(one, rebuilt) == pytest.approx((one.product() - rebuilt.product()).norm().item(), rel=0.5)


def test_inner_products_are_those_of_the_full_matrices() -> None:
    one, two = factors(7, 5, 2, 0), factors(7, 5, 3, 1)
    assert lora.inner_product(one, two) == pytest.approx((one.product() * two.product()).sum().item(), rel=1e-12)
    assert lora.norm(one) == pytest.approx(one.product().norm().item(), rel=1e-12)
    assert lora.norm(factors(3, 3, 0, 0)) == 0.0


def test_the_norm_of_what_holds_nan_says_so() -> None:
    assert math.isnan(lora.product_norm(torch.full((2, 1), math.nan).double(), torch.ones(1, 2).double()))


# --- exactness in float64


@given(adapters())
@settings(max_examples=60, deadline=None)
def test_exact_rules_equal_the_weighted_sum(case: tuple[list[Factors], list[float]]) -> None:
    parts, weights = case
    if not any(part.rank for part in parts):
        return
    wanted = target(parts, weights)
    scale = 1e-10 * max(1.0, float(wanted.norm()))
    rules: list[AdapterRule] = [Flora(), FedEx(), FedEx(residual="apart"), FedEx(residual="merged"), Merge()]
    for rule in rules:
        assert rule.is_exact
        found = rule.fuse(parts, weights, "w")
        whole = found.adapter.product() + (0 if found.residual is None else found.residual.product())
        assert float((whole - wanted).norm()) <= scale, rule
        assert found.adapter.rank <= max(min(wanted.shape), max(part.rank for part in parts))
    # At full rank nothing is lost.
    full = lora.truncated(lora.stacked(parts, weights), min(wanted.shape))
    assert float((full.product() - wanted).norm()) <= scale


@given(adapters(), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_the_order_of_adapters_changes_nothing(case: tuple[list[Factors], list[float]], random: object) -> None:
    parts, weights = case
    if not any(part.rank for part in parts):
        return
    pairs = list(zip(parts, weights, strict=True))
    random.shuffle(pairs)  # type: ignore[attr-defined]
    for rule in (Flora(), FedEx(), Average(), Merge()):
        one, two = rule.fuse(parts, weights, "w"), rule.fuse([p for p, _ in pairs], [w for _, w in pairs], "w")
        for first, second in ((one.adapter, two.adapter), (one.residual, two.residual)):
            if first is not None and second is not None:
                torch.testing.assert_close(first.product(), second.product(), rtol=1e-9, atol=1e-9)


@given(adapters(), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_no_adapter_of_a_rank_is_nearer_than_that_of_svd(case: tuple[list[Factors], list[float]], rank: int) -> None:
    parts, weights = case
    if not any(part.rank for part in parts):
        return
    wanted = target(parts, weights)
    found = Svd(rank=rank).fuse(parts, weights, "w").adapter
    lost = torch.linalg.svdvals(wanted)[rank:].square().sum().sqrt()
    torch.testing.assert_close((wanted - found.product()).norm(), lost, rtol=1e-6, atol=1e-9)


@given(adapters())
@settings(max_examples=40, deadline=None)
def test_distances_are_those_of_the_full_matrices(case: tuple[list[Factors], list[float]]) -> None:
    parts, weights = case
    if not any(part.rank for part in parts):
        return
    exact, mean = lora.stacked(parts, weights), lora.averaged(parts, weights)
    wanted = float((exact.product() - mean.product()).norm())
    assert lora.distance(exact, mean) == pytest.approx(wanted, rel=1e-7, abs=1e-9)


def test_one_adapter_comes_back_as_it_is() -> None:
    part = factors(6, 5, 2, 3)
    for rule in (Flora(), Average(), Svd(), FedEx()):
        torch.testing.assert_close(rule.fuse([part], [1.0], "w").adapter.product(), part.product())
    # There is nothing to add where all agree.
    rest = FedEx(residual="apart").fuse([part, part], [0.5, 0.5], "w").residual
    assert rest is not None
    assert rest.rank == 0


def test_decomposed_gives_orthonormal_vectors_also_where_values_are_zero() -> None:
    wide = factors(6, 5, 2, 0)
    padded = Factors(
        torch.cat([wide.left, torch.zeros(6, 2).double()], 1), torch.cat([wide.right, torch.zeros(2, 5).double()])
    )
    u, s, vh = lora.decomposed(padded, 3)
    torch.testing.assert_close(u.T @ u, torch.eye(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(vh @ vh.T, torch.eye(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(s[:2], torch.linalg.svdvals(wide.product())[:2], rtol=0, atol=1e-12)
    assert s[2] < 1e-12
    torch.testing.assert_close((u * s) @ vh, wide.product(), rtol=0, atol=1e-12)


def test_compressed_drops_what_the_tolerance_calls_rounding() -> None:
    values = Factors(torch.eye(3).double(), torch.diag(torch.tensor([1.0, 1e-3, 1e-9]).double()))
    assert [lora.compressed(values, t).rank for t in (1e-14, 1e-7, 1e-2)] == [3, 2, 1]
