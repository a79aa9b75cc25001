"""First and second moments of features per class: how to pool them exactly, and classifiers in closed form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedfuse.core.errors import DataError


@dataclass(frozen=True)
class Moments:
    """Counts, means and scatter of features.

    Args:
        counts: examples per class, shape ``(num_classes,)``, float64.
        means: mean feature per class, shape ``(num_classes, d)``, float64; zero where the count is.
        scatter: sum over examples of (x - class mean)(x - class mean)^T: shape ``(d, d)`` when it is summed over all
            classes, ``(num_classes, d, d)`` when it is kept per class; float64.
    """

    counts: Tensor
    means: Tensor
    scatter: Tensor

    @property
    def is_per_class(self) -> bool:
        """Whether the scatter is kept per class."""
        return self.scatter.ndim == 3


def class_moments(features: Tensor, labels: Tensor, num_classes: int, *, per_class: bool) -> Moments:
    """Moments of labelled features.

    Args:
        features: shape ``(n, d)``.
        labels: shape ``(n,)``, in ``0 .. num_classes - 1``.
        num_classes: number of classes.
        per_class: keep the scatter of each class apart.

    Returns:
        The moments, in float64.

    Example:
        >>> m = class_moments(torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([0, 0, 1]), 2, per_class=False)
        >>> m.counts.tolist(), m.means.tolist(), m.scatter.tolist()
        ([2.0, 1.0], [[1.0], [5.0]], [[2.0]])
    """
    x = features.double()
    counts = torch.bincount(labels, minlength=num_classes).double()
    means = torch.zeros(num_classes, x.shape[1], dtype=torch.float64).index_add_(0, labels, x)
    means /= counts.clamp(min=1)[:, None]
    centred = x - means[labels]
    if per_class:
        scatter = torch.stack([centred[labels == c].T @ centred[labels == c] for c in range(num_classes)])
    else:
        scatter = centred.T @ centred
    return Moments(counts, means, scatter)


def pool(parts: Iterable[Moments]) -> Moments:
    """Moments of the union of several data sets, exactly, from the moments of each.

    Taken one after another, so memory does not grow with their number:
    scatter of a union = sum of the scatters + n_a n_b / (n_a + n_b) (mean_a - mean_b)(mean_a - mean_b)^T per class.

    Args:
        parts: at least one; all with the same shapes.

    Returns:
        The pooled moments.

    Raises:
        DataError: there are none.

    Example:
        >>> a = class_moments(torch.tensor([[0.0]]), torch.tensor([0]), 1, per_class=False)
        >>> b = class_moments(torch.tensor([[2.0]]), torch.tensor([0]), 1, per_class=False)
        >>> pool([a, b]).means.item(), pool([a, b]).scatter.item()
        (1.0, 2.0)
    """
    pooled: Moments | None = None
    for part in parts:
        pooled = part if pooled is None else _pool_two(pooled, part)
    if pooled is None:
        raise DataError("there are no moments to pool", fix="ask at least one client")
    return pooled


def _pool_two(a: Moments, b: Moments) -> Moments:
    counts = a.counts + b.counts
    safe = counts.clamp(min=1)
    means = (a.counts[:, None] * a.means + b.counts[:, None] * b.means) / safe[:, None]
    gap = a.means - b.means
    weights = a.counts * b.counts / safe
    if a.is_per_class:
        between = weights[:, None, None] * gap[:, :, None] * gap[:, None, :]
    else:
        between = (gap * weights[:, None]).T @ gap
    return Moments(counts, means, a.scatter + b.scatter + between)


def oas_shrinkage(scatter: Tensor, num_examples: float) -> float:
    """Oracle approximating shrinkage towards a scaled identity (Chen et al., 2010, equation 23).

    Needs only traces, so it comes from pooled moments with no look at any data.

    Args:
        scatter: sum of centred outer products, shape ``(d, d)``.
        num_examples: examples behind it.

    Returns:
        Weight of the identity, in [0, 1].
    """
    d = scatter.shape[0]
    covariance = scatter / max(num_examples, 1)
    trace_square = (covariance**2).sum()
    square_trace = covariance.trace() ** 2
    numerator = trace_square / d**2 + square_trace / d**2
    denominator = (num_examples + 1) * (trace_square / d**2 - square_trace / d**3)
    return 1.0 if denominator <= 0 else float((numerator / denominator).clamp(0, 1))


def lda_head(moments: Moments, *, shrinkage: float | None = None, priors: str = "pooled") -> tuple[Tensor, Tensor]:
    """Linear discriminant analysis in closed form.

    Args:
        moments: pooled; a scatter per class is summed.
        shrinkage: weight of the scaled identity in the within-class covariance, in [0, 1]; ``None`` takes
            :func:`oas_shrinkage`.
        priors: ``pooled`` uses the classes' frequencies, ``uniform`` treats them as equally likely.

    Returns:
        Weights, shape ``(num_classes, d)``, and biases, shape ``(num_classes,)``, float64. Classes without an
        example get a bias that never wins.
    """
    total = moments.counts.sum()
    scatter = moments.scatter.sum(0) if moments.is_per_class else moments.scatter
    d = scatter.shape[0]
    amount = oas_shrinkage(scatter, float(total)) if shrinkage is None else shrinkage
    covariance = scatter / total
    level = covariance.trace() / d
    # A trace of zero (features that never vary) would leave nothing to invert.
    floor = level * 1e-9 + 1e-12
    regular = (1 - amount) * covariance + (amount * level + floor) * torch.eye(d, dtype=torch.float64)
    weights = torch.linalg.solve(regular, moments.means.T).T
    biases = -0.5 * (weights * moments.means).sum(1)
    if priors == "pooled":
        biases = biases + (moments.counts.clamp(min=1) / total).log()
    seen = moments.counts > 0
    lowest = torch.finfo(torch.float32).min / 4
    return weights * seen[:, None], torch.where(seen, biases, torch.tensor(lowest, dtype=torch.float64))


def gaussian_draws(moments: Moments, num_draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw virtual features from a Gaussian per class (CCVR, Luo et al., NeurIPS 2021).

    Args:
        moments: pooled, per class; with one scatter for all classes that is used for each.
        num_draws: features per class that has any example.
        generator: decides the draws.

    Returns:
        Features, shape ``(n, d)``, float32, and their labels, shape ``(n,)``.
    """
    d = moments.means.shape[1]
    features, labels = [], []
    for c in torch.nonzero(moments.counts > 0).flatten().tolist():
        if moments.is_per_class:
            covariance = moments.scatter[c] / max(float(moments.counts[c]) - 1, 1.0)
        else:
            covariance = moments.scatter / max(float(moments.counts.sum() - (moments.counts > 0).sum()), 1.0)
        # An eigendecomposition takes singular covariances too, which few examples and ReLU features give.
        values, vectors = torch.linalg.eigh(covariance)
        root = vectors * values.clamp(min=0).sqrt()
        noise = torch.randn(num_draws, d, generator=generator, dtype=torch.float64)
        features.append((moments.means[c] + noise @ root.T).float())
        labels.append(torch.full((num_draws,), c, dtype=torch.int64))
    return torch.cat(features), torch.cat(labels)


def pack_symmetric(matrices: Tensor) -> Tensor:
    """Upper triangles of symmetric matrices: half the bytes.

    Args:
        matrices: shape ``(..., d, d)``.

    Returns:
        Shape ``(..., d * (d + 1) / 2)``.
    """
    d = matrices.shape[-1]
    row, column = torch.triu_indices(d, d)
    return matrices[..., row, column]


def unpack_symmetric(packed: Tensor, d: int) -> Tensor:
    """Turn packed upper triangles back into symmetric matrices.

    Args:
        packed: shape ``(..., d * (d + 1) / 2)``.
        d: side of the matrices.

    Returns:
        Shape ``(..., d, d)``.

    Example:
        >>> unpack_symmetric(pack_symmetric(torch.tensor([[1.0, 2.0], [2.0, 3.0]])), 2).tolist()
        [[1.0, 2.0], [2.0, 3.0]]
    """
    row, column = torch.triu_indices(d, d)
    matrices = packed.new_zeros((*packed.shape[:-1], d, d))
    matrices[..., row, column] = packed
    matrices[..., column, row] = packed
    return matrices
