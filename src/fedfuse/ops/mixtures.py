"""Gaussian mixtures of features: fitted where the data is, drawn from where it is not; and diagonal moments."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedfuse.core.errors import DataError
from fedfuse.ops.moments import pack_symmetric, unpack_symmetric

CovarianceKind = Literal["spherical", "diagonal", "full"]
_SKLEARN_NAMES = {"spherical": "spherical", "diagonal": "diag", "full": "full"}
_LEAST_VARIANCE = 1e-6


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians.

    Args:
        weights: of the components, shape ``(m,)``; a component of weight 0 is never drawn from.
        means: shape ``(m, d)``.
        covariances: shape ``(m,)`` if spherical, ``(m, d)`` if diagonal, ``(m, d (d + 1) / 2)`` if full, packed.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor


def covariance_size(kind: CovarianceKind, d: int) -> tuple[int, ...]:
    """Shape of one component's covariance.

    Args:
        kind: what it can express.
        d: width of the features.

    Returns:
        ``()``, ``(d,)`` or ``(d (d + 1) / 2,)``.

    Example:
        >>> [covariance_size(kind, 3) for kind in ("spherical", "diagonal", "full")]
        [(), (3,), (6,)]
    """
    return {"spherical": (), "diagonal": (d,), "full": (d * (d + 1) // 2,)}[kind]


def fit_mixture(x: Tensor, num_mixtures: int, kind: CovarianceKind, *, seed: int) -> Mixture:
    """Fit a mixture to features of one class.

    One component is a mean and a covariance, in closed form; more are fitted by expectation maximisation, with never
    more components than examples.

    Args:
        x: shape ``(n, d)``, at least one row.
        num_mixtures: components, at least 1; those that cannot be fitted have weight 0.
        kind: what a covariance can express.
        seed: where the fit of several components starts.

    Returns:
        The mixture, in float64.

    Example:
        >>> found = fit_mixture(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), 1, "spherical", seed=0)
        >>> found.weights.tolist(), found.means.tolist(), found.covariances.tolist()
        ([1.0], [[1.0, 1.0]], [0.5])
    """
    x = x.double()
    n, d = x.shape
    count = min(num_mixtures, n)
    weights = torch.zeros(num_mixtures, dtype=torch.float64)
    means = torch.zeros(num_mixtures, d, dtype=torch.float64)
    covariances = torch.zeros((num_mixtures, *covariance_size(kind, d)), dtype=torch.float64)
    if count == 1:
        centred = x - x.mean(0)
        weights[0], means[0] = 1.0, x.mean(0)
        if kind == "full":
            covariances[0] = pack_symmetric(centred.T @ centred / n)
        else:
            variances = centred.square().mean(0)
            covariances[0] = variances.mean() if kind == "spherical" else variances
        return Mixture(weights, means, covariances)
    from sklearn.mixture import GaussianMixture

    model = GaussianMixture(
        count, covariance_type=_SKLEARN_NAMES[kind], reg_covar=_LEAST_VARIANCE, random_state=seed % 2**32
    )
    with warnings.catch_warnings():
        # A fit that has not converged, or repeated examples, still give a usable mixture.
        warnings.simplefilter("ignore")
        model.fit(x.numpy())
    weights[:count], means[:count] = torch.from_numpy(model.weights_), torch.from_numpy(model.means_)
    found = torch.from_numpy(model.covariances_)
    covariances[:count] = pack_symmetric(found) if kind == "full" else found
    return Mixture(weights, means, covariances)


def draw_mixture(mixture: Mixture, num_draws: int, kind: CovarianceKind, generator: torch.Generator) -> Tensor:
    """Draw from a mixture.

    Args:
        mixture: with at least one component of positive weight.
        num_draws: how many.
        kind: what its covariances express.
        generator: decides the draws.

    Returns:
        Shape ``(num_draws, d)``, float32.
    """
    weights, means = mixture.weights.double(), mixture.means.double()
    d = means.shape[1]
    chosen = torch.multinomial(weights, num_draws, replacement=True, generator=generator)
    noise = torch.randn(num_draws, d, generator=generator, dtype=torch.float64)
    covariances = mixture.covariances.double()
    if kind != "full":
        deviations = covariances.clamp(min=0).sqrt().reshape(len(weights), -1)
        return (means[chosen] + noise * deviations[chosen]).float()
    draws = means[chosen]
    for component in chosen.unique().tolist():
        is_its = chosen == component
        # Rounded covariances of few examples are not positive definite; eigenvalues can be cut off at zero.
        values, vectors = torch.linalg.eigh(unpack_symmetric(covariances[component], d))
        draws[is_its] += noise[is_its] @ (vectors * values.clamp(min=0).sqrt()).T
    return draws.float()


@dataclass(frozen=True)
class DiagonalMoments:
    """Counts, means and squared deviations of every feature by itself.

    Args:
        counts: examples per class, shape ``(num_classes,)``, float64.
        means: mean feature per class, shape ``(num_classes, d)``, float64; zero where the count is.
        squares: squared deviations from a class's mean, summed over examples, shape ``(num_classes, d)``, float64.
    """

    counts: Tensor
    means: Tensor
    squares: Tensor


def diagonal_moments(features: Tensor, labels: Tensor, num_classes: int) -> DiagonalMoments:
    """Moments of labelled features.

    Args:
        features: shape ``(n, d)``.
        labels: shape ``(n,)``, in ``0 .. num_classes - 1``.
        num_classes: number of classes.

    Example:
        >>> found = diagonal_moments(torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([0, 0, 1]), 2)
        >>> found.counts.tolist(), found.means.tolist(), found.squares.tolist()
        ([2.0, 1.0], [[1.0], [5.0]], [[2.0], [0.0]])
    """
    x = features.double()
    counts = torch.bincount(labels, minlength=num_classes).double()
    zeros = torch.zeros(num_classes, x.shape[1], dtype=torch.float64)
    means = zeros.index_add(0, labels, x) / counts.clamp(min=1)[:, None]
    return DiagonalMoments(counts, means, zeros.index_add(0, labels, (x - means[labels]).square()))


def pool_diagonal(parts: Sequence[DiagonalMoments]) -> DiagonalMoments:
    """Moments of the union of several data sets, exactly, from the moments of each.

    Args:
        parts: at least one; all with the same shapes.

    Raises:
        DataError: there are none.

    Example:
        >>> a = diagonal_moments(torch.tensor([[0.0]]), torch.tensor([0]), 1)
        >>> b = diagonal_moments(torch.tensor([[2.0]]), torch.tensor([0]), 1)
        >>> pool_diagonal([a, b]).means.item(), pool_diagonal([a, b]).squares.item()
        (1.0, 2.0)
    """
    if not parts:
        raise DataError("there are no moments to pool", fix="ask at least one client")
    counts = torch.stack([part.counts for part in parts])
    means = torch.stack([part.means for part in parts])
    pooled = (counts[:, :, None] * means).sum(0) / counts.sum(0).clamp(min=1)[:, None]
    between = (counts[:, :, None] * (means - pooled).square()).sum(0)
    return DiagonalMoments(counts.sum(0), pooled, torch.stack([part.squares for part in parts]).sum(0) + between)
