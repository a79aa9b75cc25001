"""Losses that draw examples of a class together."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def supervised_contrast(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss (Khosla et al., 2020, equation 2), the mean over anchors.

    For anchor i with positives P(i), the others of its class: -1 / |P(i)| sum_p log softmax_{a != i}(f_i f_a / t)_p.

    Args:
        features: of unit length, shape ``(n, d)``.
        labels: shape ``(n,)``.
        temperature: t, above 0.

    Returns:
        A scalar; anchors without a positive count as 0.

    Example:
        >>> f = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> round(supervised_contrast(f, torch.tensor([0, 0, 1]), 1.0).item(), 4)
        0.2088
    """
    itself = torch.eye(len(labels), dtype=torch.bool, device=features.device)
    similar = (features @ features.T / temperature).masked_fill(itself, -torch.inf)
    log_shares = (similar - similar.logsumexp(1, keepdim=True)).masked_fill(itself, 0)
    is_positive = (labels[:, None] == labels[None, :]) & ~itself
    per_anchor = -(log_shares * is_positive).sum(1) / is_positive.sum(1).clamp(min=1)
    return per_anchor.mean()


def prototype_contrast(prototypes: Tensor) -> Tensor:
    """Cross-entropy of each prototype against all of them: small when each is most like itself.

    Args:
        prototypes: shape ``(num_classes, d)``.

    Returns:
        A scalar.

    Example:
        >>> round(prototype_contrast(torch.eye(2)).item(), 4)
        0.3133
    """
    return F.cross_entropy(prototypes @ prototypes.T, torch.arange(len(prototypes), device=prototypes.device))
