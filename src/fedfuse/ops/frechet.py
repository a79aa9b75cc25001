"""How far two clouds of features are apart, each taken as a Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor

from fedfuse.core.errors import DataError


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """The squared Frechet distance of the Gaussians that fit two sets of features (Heusel et al., NeurIPS 2017, eq. 6).

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2))`` with the sample covariances, in float64. Sets with
    fewer examples than features are fine: a covariance may be singular.

    Args:
        first: shape ``(num_first, d)``, at least 2 rows.
        second: shape ``(num_second, d)``, at least 2 rows.

    Returns:
        0 or more; 0 for equal means and covariances.

    Raises:
        DataError: a set has fewer than 2 rows, or the widths differ.

    Example:
        >>> frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [5.0]]))
        9.0
    """
    if min(len(first), len(second)) < 2 or first.shape[1] != second.shape[1]:
        raise DataError(
            f"features of shape {tuple(first.shape)} and {tuple(second.shape)} cannot be compared",
            fix="give at least 2 rows of each, of one width",
        )
    one, two = _factor(first.double()), _factor(second.double())
    means = (first.double().mean(0) - second.double().mean(0)).square().sum()
    # The trace of that root is the sum of the singular values of R1 R2^T, where R^T R is a covariance. No square of a
    # covariance is formed, so no digits are lost.
    shared = torch.linalg.svdvals(one @ two.T).sum()
    return float((means + one.square().sum() + two.square().sum() - 2 * shared).clamp(min=0))


def _factor(features: Tensor) -> Tensor:
    """R of ``R^T R``, the sample covariance; shape ``(min(n, d), d)``."""
    centred = (features - features.mean(0)) / (len(features) - 1) ** 0.5
    factor: Tensor = torch.linalg.qr(centred, mode="r").R
    return factor
