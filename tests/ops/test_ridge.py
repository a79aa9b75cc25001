"""Ridge regression from sums over examples."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn import functional as F

from fedfuse.core.errors import DataError
from fedfuse.ops.ridge import add_up, gcv_score, gram_sums, solve_ridge


def some(n: int, d: int = 6, num_classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(0, num_classes, (n,), generator=draw)
    x = torch.randn(n, d, generator=draw, dtype=torch.float64) + torch.arange(d) + y[:, None]
    return x, y


@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_it_is_scikit_learns_ridge_on_the_pooled_data(ridge: float) -> None:
    x, y = some(40)
    sums = gram_sums(x, y, 3)
    centred = x - x.mean(0)
    penalty = ridge * float(centred.square().sum()) / 6
    theirs = Ridge(alpha=penalty, fit_intercept=True, solver="cholesky").fit(
        x.numpy(), F.one_hot(y, 3).double().numpy()
    )
    ours = solve_ridge(sums, ridge)
    torch.testing.assert_close(ours.weights, torch.from_numpy(theirs.coef_), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.biases, torch.from_numpy(theirs.intercept_), rtol=1e-10, atol=1e-10)


@given(
    cuts=st.lists(st.integers(0, 60), max_size=7),
    leaver=st.integers(0, 7),
    order=st.randoms(use_true_random=False),
    ridge=st.sampled_from([None, 1e-4, 0.1]),
)
def test_any_partition_in_any_order_with_a_client_added_and_removed(
    cuts: list[int], leaver: int, order: random.Random, ridge: float | None
) -> None:
    x, y = some(60)
    edges = [0, *sorted(cuts), 60]
    parts = [gram_sums(x[a:b], y[a:b], 3) for a, b in itertools.pairwise(edges)]
    visitor = gram_sums(*some(15, seed=9), 3)
    shuffled = [*parts, visitor]
    order.shuffle(shuffled)
    pooled = solve_ridge(gram_sums(x, y, 3), ridge)
    found = solve_ridge(add_up(shuffled) - visitor, ridge)
    assert found.ridge == pooled.ridge
    torch.testing.assert_close(found.weights, pooled.weights, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.biases, pooled.biases, rtol=1e-10, atol=1e-10)
    gone = leaver % len(parts)
    rest = [i for k, (a, b) in enumerate(itertools.pairwise(edges)) if k != gone for i in range(a, b)]
    if len(rest) > 20:
        left, wanted = solve_ridge(add_up(parts) - parts[gone], 0.1), solve_ridge(gram_sums(x[rest], y[rest], 3), 0.1)
        torch.testing.assert_close(left.weights, wanted.weights, rtol=1e-10, atol=1e-10)


def test_the_score_is_that_of_the_hat_matrix() -> None:
    # GCV = n |Y - S Y|^2 / (n - tr S)^2, S the matrix that takes labels to fitted values.
    x, y = some(25)
    n, penalty = 25, 3.0
    centred, labels = x - x.mean(0), F.one_hot(y, 3).double()
    inner = torch.linalg.solve(centred.T @ centred + penalty * torch.eye(6, dtype=torch.float64), centred.T)
    hat = centred @ inner + torch.full((n, n), 1 / n, dtype=torch.float64)
    wanted = n * (labels - hat @ labels).square().sum() / (n - hat.trace()) ** 2
    s, vectors = torch.linalg.eigh(centred.T @ centred)
    spread = float((labels - labels.mean(0)).square().sum())
    cross = centred.T @ (labels - labels.mean(0))
    assert gcv_score(s, vectors.T @ cross, spread, n, penalty) == pytest.approx(float(wanted), rel=1e-10)
    assert gcv_score(s[:2] * 0, cross[:2] * 0, spread, n, 0.0) == float("inf")


def test_the_penalty_that_is_chosen_has_the_least_score() -> None:
    noise = torch.randn(80, 30, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y = (noise[:, 0] + 2 * torch.randn(80, generator=torch.Generator().manual_seed(4)) > 0).long()
    chosen = solve_ridge(gram_sums(noise, y, 2)).ridge
    assert chosen >= 0.1
    clean = solve_ridge(gram_sums(noise, (noise[:, 0] > 0).long(), 2)).ridge
    assert clean < chosen


def test_scores_add_up_to_one_and_a_class_without_an_example_scores_nothing() -> None:
    x, y = some(30)
    found = solve_ridge(gram_sums(x, y, 5), 0.01)
    scores = x @ found.weights.T + found.biases
    torch.testing.assert_close(scores.sum(1), torch.ones(30, dtype=torch.float64))
    assert torch.all(scores[:, 3:].abs() < 1e-12)
    assert set(scores.argmax(1).tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("ridge", [None, 0.0, 0.1])
def test_one_example_and_features_that_never_vary(ridge: float | None) -> None:
    alone = solve_ridge(gram_sums(torch.tensor([[2.0, 3.0]]), torch.tensor([1]), 3), ridge)
    assert alone.weights.abs().max() == 0
    assert alone.biases.tolist() == [0.0, 1.0, 0.0]
    x, y = some(30)
    constant = torch.cat([x, torch.full((30, 1), 7.0, dtype=torch.float64)], 1)
    found = solve_ridge(gram_sums(constant, y, 3), ridge)
    assert found.weights[:, 6].abs().max() < 1e-9
    assert torch.isfinite(found.weights).all()


def test_without_a_penalty_it_is_the_shortest_least_squares_solution() -> None:
    x, y = some(8, d=12)
    found = solve_ridge(gram_sums(x, y, 3), 0.0)
    centred, labels = x - x.mean(0), F.one_hot(y, 3).double()
    wanted = torch.linalg.pinv(centred) @ (labels - labels.mean(0))
    torch.testing.assert_close(found.weights.T, wanted, rtol=1e-8, atol=1e-8)


def test_nothing_to_add_up_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        add_up([])
    assert str(caught.value) == "there are no sums to add up\n  fix:   ask at least one client"
