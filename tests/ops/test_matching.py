"""Assignment and exact transport, by hand and by property."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedfuse.core.errors import ModelError
from fedfuse.ops import matching
from fedfuse.ops.matching import assignment, coupling, squared_distances


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_distances_by_hand() -> None:
    found = squared_distances(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[3.0, 4.0]]))
    assert found.tolist() == [[25.0], [13.0]]
    assert found.dtype == torch.float64


def test_rounding_makes_no_negative_distance() -> None:
    x = 1e6 + random(40, 7)
    assert bool((squared_distances(x, x) >= 0).all())


def test_the_cheapest_assignment_by_hand() -> None:
    # Greedy would give target 0 its source 0 and pay 0 + 9; the best pays 1 + 1.
    assert assignment(torch.tensor([[0.0, 1.0], [1.0, 9.0]])).tolist() == [1, 0]


def test_a_permuted_set_is_found_back() -> None:
    x, order = random(30, 4), torch.randperm(30, generator=torch.Generator().manual_seed(1))
    found = assignment(squared_distances(x, x[order]))
    torch.testing.assert_close(x[order][found], x, rtol=0, atol=0)


def test_blocks_stay_together() -> None:
    # Unconstrained, 0 would be exchanged with 2 alone; blocks {0, 1} and {2, 3} may only change places as wholes.
    cost = torch.tensor([[9.0, 9, 0, 9], [9, 0, 9, 9], [0, 9, 9, 9], [9, 9, 9, 0]])
    assert assignment(cost).tolist() == [2, 1, 0, 3]
    found = assignment(cost, num_blocks=2)
    assert found.tolist() in ([2, 3, 0, 1], [0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2], [2, 3, 1, 0], [3, 2, 0, 1])
    assert {frozenset(found[:2].tolist()), frozenset(found[2:].tolist())} == {frozenset({0, 1}), frozenset({2, 3})}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(4, 1), (4, 2), (6, 2), (6, 3), (5, 1)]))
def test_an_assignment_is_the_best_of_all_that_are_allowed(seed: int, shape: tuple[int, int]) -> None:
    n, num_blocks = shape
    cost, size = random(n, n, seed=seed), n // num_blocks

    def keeps_blocks(order: tuple[int, ...]) -> bool:
        return all(len({j // size for j in order[b * size : (b + 1) * size]}) == 1 for b in range(num_blocks))

    def price(order: tuple[int, ...]) -> float:
        return float(cost[range(n), list(order)].sum())

    best = min(price(order) for order in permutations(range(n)) if keeps_blocks(order))
    found = tuple(assignment(cost, num_blocks).tolist())
    assert keeps_blocks(found)
    assert price(found) == pytest.approx(best)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10_000))
def test_a_plan_keeps_its_masses_and_both_solvers_agree(m: int, n: int, seed: int) -> None:
    cost = random(m, n, seed=seed)
    plan, programme = coupling(cost), matching._programme(cost)
    for found in (plan, programme):
        assert bool((found >= 0).all())
        torch.testing.assert_close(found.sum(1), torch.ones(m, dtype=torch.float64))
        torch.testing.assert_close(found.sum(0), torch.full((n,), m / n, dtype=torch.float64))
    assert float((plan * cost).sum()) == pytest.approx(float((programme * cost).sum()))


def test_widths_that_have_little_in_common_are_solved_as_a_linear_programme() -> None:
    plan = coupling(random(47, 53))
    assert plan.shape == (47, 53)
    torch.testing.assert_close(plan.sum(1), torch.ones(47, dtype=torch.float64))


def test_equal_widths_give_a_permutation_matrix() -> None:
    plan = coupling(random(49, 49))
    assert set(plan.unique().tolist()) == {0.0, 1.0}
    assert plan.sum(0).tolist() == plan.sum(1).tolist() == [1.0] * 49


def test_a_plan_between_blocks_of_different_widths() -> None:
    # Source blocks {0, 1} and {2, 3}, target blocks {0} and {1}; crossed is cheaper.
    cost = torch.tensor([[5.0, 5, 0, 1], [1, 0, 5, 5]])
    assert coupling(cost, num_blocks=2).tolist() == [[0, 0, 0.5, 0.5], [0.5, 0.5, 0, 0]]


def test_what_cannot_be_matched_is_refused() -> None:
    with pytest.raises(ModelError) as caught:
        assignment(torch.zeros(3, 4))
    assert str(caught.value) == (
        "4 channels cannot be assigned to 3\n  fix:   use otfusion for clients with different widths"
    )
    with pytest.raises(ModelError) as caught:
        coupling(torch.zeros(4, 6), num_blocks=4)
    assert str(caught.value) == (
        "4 and 6 channels cannot be cut into 4 blocks\n"
        "  fix:   use group normalisation with a number of groups that divides the channels"
    )
    with pytest.raises(ModelError) as caught:
        coupling(torch.tensor([[float("inf")]]))
    assert str(caught.value) == "a cost of matching is not finite\n  fix:   check the clients' weights"
