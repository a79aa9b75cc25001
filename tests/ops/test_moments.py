"""Moments: pooled exactly, and the classifiers that follow from them, against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedfuse.core.errors import DataError
from fedfuse.ops.moments import (
    Moments,
    class_moments,
    gaussian_draws,
    lda_head,
    oas_shrinkage,
    pack_symmetric,
    pool,
    unpack_symmetric,
)


def labelled(n: int, d: int, num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Overlapping classes with correlated features of different scales."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g, dtype=torch.float64)
    centres = 2 * torch.randn(num_classes, d, generator=g, dtype=torch.float64)
    y = torch.randint(0, num_classes, (n,), generator=g)
    return torch.randn(n, d, generator=g, dtype=torch.float64) @ mix + centres[y], y


def close(a: Moments, b: Moments, tolerance: float = 1e-10) -> None:
    for x, y in ((a.counts, b.counts), (a.means, b.means), (a.scatter, b.scatter)):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# --- moments


def test_moments_by_hand() -> None:
    x = torch.tensor([[0.0, 0.0], [2.0, 4.0], [5.0, 5.0]])
    y = torch.tensor([0, 0, 2])
    summed = class_moments(x, y, 3, per_class=False)
    assert summed.counts.tolist() == [2, 0, 1]
    assert summed.means.tolist() == [[1, 2], [0, 0], [5, 5]]
    assert summed.scatter.tolist() == [[2, 4], [4, 8]]
    assert not summed.is_per_class
    kept = class_moments(x, y, 3, per_class=True)
    assert kept.scatter.tolist() == [[[2, 4], [4, 8]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]]
    assert kept.is_per_class
    assert {t.dtype for t in (kept.counts, kept.means, kept.scatter)} == {torch.float64}


def test_moments_of_nothing() -> None:
    for per_class in (True, False):
        found = class_moments(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), 2, per_class=per_class)
        assert all(not t.any() for t in (found.counts, found.means, found.scatter))


def test_moments_far_from_the_origin_lose_no_digits() -> None:
    # Sums of squares minus squares of sums would have lost them all.
    x, y = labelled(50, 3, 2)
    near, far = class_moments(x, y, 2, per_class=False), class_moments(x + 1e6, y, 2, per_class=False)
    torch.testing.assert_close(near.scatter, far.scatter, rtol=1e-6, atol=1e-6)


@settings(max_examples=60)
@given(
    n=st.integers(0, 30),
    d=st.integers(1, 4),
    num_classes=st.integers(1, 4),
    num_parts=st.integers(1, 5),
    per_class=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_pooled_moments_are_the_moments_of_the_pooled_data(
    n: int, d: int, num_classes: int, num_parts: int, per_class: bool, seed: int
) -> None:
    x, y = labelled(n, d, num_classes, seed)
    owner = torch.randint(0, num_parts, (n,), generator=torch.Generator().manual_seed(seed + 1))
    # Clients that hold one class only are the hard case.
    for owners in (owner, y % num_parts):
        parts = [
            class_moments(x[owners == k], y[owners == k], num_classes, per_class=per_class) for k in range(num_parts)
        ]
        close(pool(parts), class_moments(x, y, num_classes, per_class=per_class))
        close(pool(reversed(parts)), pool(parts))


def test_pooling_nothing() -> None:
    with pytest.raises(DataError) as caught:
        pool([])
    assert str(caught.value) == "there are no moments to pool\n  fix:   ask at least one client"


def test_pooling_takes_one_after_another_and_changes_none() -> None:
    x, y = labelled(12, 2, 2)
    parts = [class_moments(x[k::3], y[k::3], 2, per_class=True) for k in range(3)]
    before = [part.scatter.clone() for part in parts]
    pool(part for part in parts)
    assert all(part.scatter.equal(old) for part, old in zip(parts, before, strict=True))
    assert pool(parts[:1]) is parts[0]


# --- shrinkage


@pytest.mark.parametrize(("n", "d"), [(5, 3), (50, 3), (20, 30), (500, 10)])
def test_the_shrinkage_is_the_one_of_scikit_learn(n: int, d: int) -> None:
    # sklearn.covariance.oas centres by one mean and divides by n: moments of a single class say the same.
    from sklearn.covariance import oas

    x, _ = labelled(n, d, 1)
    moments = class_moments(x, torch.zeros(n, dtype=torch.int64), 1, per_class=False)
    assert oas_shrinkage(moments.scatter, n) == pytest.approx(oas(x.numpy())[1], rel=1e-10)


def test_the_shrinkage_by_hand() -> None:
    # S = diag(1, 3): tr(S^2)/4 = 2.5, tr(S)^2/4 = 4, so (2.5 + 4) / ((9 + 1) (2.5 - 2)) = 1.3, at most 1;
    # with 39 examples 6.5 / (40 * 0.5).
    assert oas_shrinkage(9 * torch.diag(torch.tensor([1.0, 3.0])), 9) == 1.0
    assert oas_shrinkage(39 * torch.diag(torch.tensor([1.0, 3.0])).double(), 39) == pytest.approx(6.5 / 20)


@pytest.mark.parametrize("scatter", [torch.zeros(3, 3), torch.eye(3), torch.ones(1, 1)])
def test_where_there_is_nothing_to_learn_the_shrinkage_is_whole(scatter: Tensor) -> None:
    assert oas_shrinkage(scatter.double(), 10) == 1.0


# --- linear discriminant analysis


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 0.7, 1.0])
def test_the_head_is_the_one_of_scikit_learn(shrinkage: float) -> None:
    # Its within-class covariance is the classes' covariances (divided by their counts, each shrunk) weighted by the
    # classes' frequencies. Both steps are linear, so that is the pooled scatter divided by n, shrunk: our definition.
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    x, y = labelled(300, 5, 4)
    parts = [class_moments(x[y % 3 == k], y[y % 3 == k], 4, per_class=False) for k in range(3)]
    weights, biases = lda_head(pool(parts), shrinkage=shrinkage)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(weights.numpy(), theirs.coef_, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(biases.numpy(), theirs.intercept_, rtol=1e-6, atol=1e-8)
    ours = (x @ weights.T + biases).argmax(1)
    assert ours.tolist() == theirs.predict(x.numpy()).tolist()


def test_uniform_priors_are_those_of_scikit_learn() -> None:
    # With given priors its covariance is weighted by them; the shared truth here is classes of equal size but for
    # the prior itself, so only the bias of the frequencies differs.
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    x, _ = labelled(90, 3, 1)
    y = torch.arange(90) % 3
    moments = class_moments(x, y, 3, per_class=False)
    weights, biases = lda_head(moments, shrinkage=0.2, priors="uniform")
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.2, priors=[1 / 3] * 3).fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(weights.numpy(), theirs.coef_, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(biases.numpy() + math.log(1 / 3), theirs.intercept_, rtol=1e-6, atol=1e-9)


def test_the_head_by_hand() -> None:
    # Two classes at -1 and +1, each with a variance of 1: weights mean / 1, biases -mean^2 / 2 + log prior.
    x, y = torch.tensor([[-2.0], [0.0], [0.0], [2.0]]), torch.tensor([0, 0, 1, 1])
    weights, biases = lda_head(class_moments(x, y, 2, per_class=False), shrinkage=0.0)
    torch.testing.assert_close(weights, torch.tensor([[-1.0], [1.0]]).double(), rtol=1e-8, atol=0)
    torch.testing.assert_close(biases, torch.full((2,), -0.5 + math.log(0.5)).double(), rtol=1e-8, atol=0)


def test_a_scatter_per_class_gives_the_same_head() -> None:
    x, y = labelled(60, 3, 3)
    heads = [lda_head(class_moments(x, y, 3, per_class=per_class)) for per_class in (True, False)]
    for a, b in zip(*heads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_left_out_the_shrinkage_is_the_oracle_approximation() -> None:
    x, y = labelled(40, 6, 2)
    moments = class_moments(x, y, 2, per_class=False)
    wanted = lda_head(moments, shrinkage=oas_shrinkage(moments.scatter, 40))
    assert all(a.equal(b) for a, b in zip(lda_head(moments), wanted, strict=True))


@pytest.mark.parametrize("priors", ["pooled", "uniform"])
def test_a_class_that_nobody_has_never_wins(priors: str) -> None:
    x, y = labelled(60, 3, 2)
    weights, biases = lda_head(class_moments(x, y, 4, per_class=False), priors=priors)
    logits = (100 * x) @ weights.T + biases
    assert set(logits.argmax(1).tolist()) <= {0, 1}
    # Float32, in which heads are stored, holds them too.
    assert bool(torch.isfinite(logits.float()).all())


def test_features_that_never_vary_can_be_used() -> None:
    x, y = torch.ones(6, 3), torch.tensor([0, 1] * 3)
    weights, biases = lda_head(class_moments(x, y, 2, per_class=False))
    assert bool(torch.isfinite(weights).all())
    assert bool(torch.isfinite(biases).all())


# --- draws


def test_draws_have_the_means_and_covariances_of_their_classes() -> None:
    x, y = labelled(200, 3, 2)
    moments = class_moments(x, y, 2, per_class=True)
    features, labels = gaussian_draws(moments, 40_000, torch.Generator().manual_seed(1))
    assert features.dtype == torch.float32
    assert labels.tolist() == [0] * 40_000 + [1] * 40_000
    for c in range(2):
        drawn, real = features[labels == c].double(), x[y == c]
        scale = float(real.T.cov().diagonal().max())
        # Standard errors are about scale / sqrt(40,000) = 0.005 scale.
        torch.testing.assert_close(drawn.mean(0), real.mean(0), rtol=0, atol=0.025 * scale**0.5)
        torch.testing.assert_close(drawn.T.cov(), real.T.cov(), rtol=0, atol=0.035 * scale)


def test_a_common_scatter_is_used_for_every_class() -> None:
    x, y = labelled(200, 2, 3)
    moments = class_moments(x, y, 3, per_class=False)
    features, labels = gaussian_draws(moments, 40_000, torch.Generator().manual_seed(1))
    common = moments.scatter / (200 - 3)
    for c in range(3):
        drawn = features[labels == c].double()
        torch.testing.assert_close(drawn.T.cov(), common, rtol=0, atol=0.035 * float(common.diagonal().max()))


def test_classes_that_nobody_has_do_not_widen_the_common_covariance() -> None:
    # Ten classes, one of them seen: a degree of freedom is lost per mean that was estimated, and that is one.
    x = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    moments = class_moments(x, torch.zeros(12, dtype=torch.int64), 10, per_class=False)
    features, labels = gaussian_draws(moments, 20_000, torch.Generator().manual_seed(1))
    assert labels.unique().tolist() == [0]
    torch.testing.assert_close(features.T.cov(), x.T.cov(), rtol=0, atol=0.1)


def test_draws_are_decided_by_the_generator() -> None:
    moments = class_moments(*labelled(20, 2, 2), 2, per_class=True)
    a, b, c = (gaussian_draws(moments, 5, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2))
    assert a.equal(b)
    assert not a.equal(c)


def test_a_singular_covariance_is_drawn_from_too() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 4.0]])
    features, _ = gaussian_draws(
        class_moments(x, torch.zeros(3, dtype=torch.int64), 1, per_class=True), 100, torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(features[:, 1], 2 * features[:, 0], rtol=1e-4, atol=1e-4)


def test_a_single_example_is_drawn_again_and_again() -> None:
    moments = class_moments(torch.tensor([[1.0, 2.0]]), torch.tensor([1]), 3, per_class=True)
    features, labels = gaussian_draws(moments, 3, torch.Generator())
    assert features.tolist() == [[1, 2]] * 3
    assert labels.tolist() == [1] * 3


# --- packing


@given(d=st.integers(1, 6), batch=st.sampled_from([(), (2,), (0,), (2, 3)]), seed=st.integers(0, 100))
def test_packing_halves_symmetric_matrices_and_loses_nothing(d: int, batch: tuple[int, ...], seed: int) -> None:
    half = torch.randn(*batch, d, d, generator=torch.Generator().manual_seed(seed))
    matrices = half + half.transpose(-1, -2)
    packed = pack_symmetric(matrices)
    assert packed.shape == (*batch, d * (d + 1) // 2)
    assert unpack_symmetric(packed, d).equal(matrices)


def test_packing_by_hand() -> None:
    packed = pack_symmetric(torch.tensor([[1, 2, 3], [2, 4, 5], [3, 5, 6]]))
    assert packed.tolist() == [1, 2, 3, 4, 5, 6]
    assert unpack_symmetric(packed, 3).tolist() == [[1, 2, 3], [2, 4, 5], [3, 5, 6]]
