"""Ridge regression on class indicators from sums over examples: exact for any split of the examples, in any order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedfuse.core.errors import DataError

_ROWS_AT_A_TIME = 4096
_GRID = tuple(10 ** (-8 + k / 2) for k in range(19))


@dataclass(frozen=True)
class GramSums:
    """What ridge regression needs to know of some examples; sums of two are those of both, differences take away.

    Args:
        gram: sum over examples of z z^T, where z is the feature vector and a 1 behind it, shape ``(d + 1, d + 1)``,
            float64.
        targets: sum over examples of z y^T, where y is the one-hot label, shape ``(d + 1, num_classes)``, float64; its
            last row counts the examples of each class.
    """

    gram: Tensor
    targets: Tensor

    def __add__(self, other: GramSums) -> GramSums:
        return GramSums(self.gram + other.gram, self.targets + other.targets)

    def __sub__(self, other: GramSums) -> GramSums:
        return GramSums(self.gram - other.gram, self.targets - other.targets)


def gram_sums(features: Tensor, labels: Tensor, num_classes: int) -> GramSums:
    """Sums over labelled features.

    Args:
        features: shape ``(n, d)``.
        labels: shape ``(n,)``, in ``0 .. num_classes - 1``.
        num_classes: number of classes.

    Returns:
        The sums, in float64; features are widened a part at a time.

    Example:
        >>> sums = gram_sums(torch.tensor([[2.0], [3.0]]), torch.tensor([0, 1]), 2)
        >>> sums.gram.tolist(), sums.targets.tolist()
        ([[13.0, 5.0], [5.0, 2.0]], [[2.0, 3.0], [1.0, 1.0]])
    """
    side = features.shape[1] + 1
    gram = torch.zeros(side, side, dtype=torch.float64)
    targets = torch.zeros(side, num_classes, dtype=torch.float64)
    for x, y in zip(features.split(_ROWS_AT_A_TIME), labels.split(_ROWS_AT_A_TIME), strict=True):
        z = F.pad(x.double(), (0, 1), value=1.0)
        gram += z.T @ z
        targets += z.T @ F.one_hot(y, num_classes).double()
    return GramSums(gram, targets)


def add_up(parts: Iterable[GramSums]) -> GramSums:
    """The sums of several sets of examples together.

    Args:
        parts: at least one, taken one after another.

    Raises:
        DataError: there are none.
    """
    total: GramSums | None = None
    for part in parts:
        total = part if total is None else total + part
    if total is None:
        raise DataError("there are no sums to add up", fix="ask at least one client")
    return total


@dataclass(frozen=True)
class RidgeSolution:
    """A linear classifier and how it was regularised.

    Args:
        weights: shape ``(num_classes, d)``, float64.
        biases: shape ``(num_classes,)``, float64. The scores of all classes add up to 1, and a class without an
            example always scores 0, so it never wins.
        ridge: the penalty, relative to the mean variance of a feature times the number of examples.
    """

    weights: Tensor
    biases: Tensor
    ridge: float


def solve_ridge(sums: GramSums, ridge: float | None = None) -> RidgeSolution:
    """Least squares on one-hot labels with a penalty on the weights; the biases bear none.

    minimise sum |W x + b - y|^2 + l |W|^2 with l = ridge * trace(S) / d, where S is the scatter of the features around
    their mean. With S = V diag(s) V^T: W^T = V diag(1 / (s + l)) V^T T, T the centred sum of x y^T.

    Args:
        sums: over all examples, at least one.
        ridge: relative penalty, 0 or more; 0 gives the shortest of all least-squares solutions. ``None`` takes, of
            half decades from 1e-8 to 10, the one with the least generalised cross-validation score (Golub, Heath and
            Wahba, 1979), which the sums alone determine.

    Returns:
        The solution.

    Example:
        >>> sums = gram_sums(torch.tensor([[0.0], [0.0], [2.0], [2.0]]), torch.tensor([0, 0, 1, 1]), 2)
        >>> found = solve_ridge(sums, ridge=1.0)
        >>> found.weights.tolist(), found.biases.tolist()
        ([[-0.25], [0.25]], [0.75, 0.25])
    """
    n, d = float(sums.gram[-1, -1]), sums.gram.shape[0] - 1
    means, frequencies = sums.gram[:-1, -1] / n, sums.targets[-1] / n
    scatter = sums.gram[:-1, :-1] - n * torch.outer(means, means)
    cross = sums.targets[:-1] - n * torch.outer(means, frequencies)
    s, V = torch.linalg.eigh(scatter)
    # Directions in which the features do not vary come out as rounding errors of either sign.
    is_real = s > s.abs().max() * d * torch.finfo(torch.float64).eps
    s = s.clamp(min=0) * is_real
    T = (V.T @ cross) * is_real[:, None]
    level = float(s.sum()) / d
    if ridge is None:
        spread = float((sums.targets[-1] * (1 - frequencies)).sum())
        ridge = min(_GRID, key=lambda candidate: gcv_score(s, T, spread, n, candidate * level))
    penalised = s + ridge * level
    weights = (V @ torch.where(penalised[:, None] > 0, T / penalised.clamp(min=1e-300)[:, None], 0.0)).T
    return RidgeSolution(weights, frequencies - weights @ means, ridge)


def gcv_score(s: Tensor, T: Tensor, spread: float, num_examples: float, penalty: float) -> float:
    """Generalised cross-validation: residual sum of squares over the squared degrees of freedom that remain.

    Args:
        s: eigenvalues of the features' scatter, shape ``(d,)``, float64, 0 or more.
        T: centred sum of x y^T in the basis of the eigenvectors, shape ``(d, num_classes)``.
        spread: sum of squares of the one-hot labels around their mean.
        num_examples: examples behind the sums.
        penalty: l above, absolute.

    Returns:
        The score; infinite where the fit leaves no freedom.
    """
    penalised = s + penalty
    if float(penalised.min()) <= 0:
        return float("inf")
    fit = T / penalised[:, None]
    residual = spread - 2 * float((fit * T).sum()) + float((fit.square() * s[:, None]).sum())
    freedom = num_examples - 1 - float((s / penalised).sum())
    if freedom < 1e-3 * num_examples:
        return float("inf")
    return num_examples * max(residual, 0.0) / freedom**2
