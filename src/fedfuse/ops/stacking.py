"""Combining classifiers by what they did on held-out examples: sums that pool over clients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def confusion_counts(logits: Tensor, labels: Tensor) -> Tensor:
    """How often each model says j where i is true.

    Args:
        logits: shape ``(n, num_members, num_classes)``.
        labels: shape ``(n,)``, in ``0 .. num_classes - 1``.

    Returns:
        Shape ``(num_members, true, predicted)``, int32; adds up over clients.

    Example:
        >>> confusion_counts(torch.tensor([[[2.0, 0.0]], [[2.0, 0.0]]]), torch.tensor([0, 1])).tolist()
        [[[1, 0], [1, 0]]]
    """
    num_members, num_classes = logits.shape[1:]
    cells = labels[:, None] * num_classes + logits.argmax(2)
    cells = cells + torch.arange(num_members) * num_classes**2
    counts = torch.bincount(cells.flatten(), minlength=num_members * num_classes**2)
    return counts.view(num_members, num_classes, num_classes).to(torch.int32)


def log_likelihoods(counts: Tensor, smoothing: float) -> Tensor:
    """Logarithm of P(a model says j | i is true).

    Args:
        counts: shape ``(num_members, true, predicted)``.
        smoothing: examples that are added to each row, spread evenly over it; above 0. A row without any example
            says nothing.

    Returns:
        The same shape, float64; each row's probabilities add up to 1.

    Example:
        >>> (10000 * log_likelihoods(torch.tensor([[[3, 0], [0, 0]]]), 1.0).exp()).round().tolist()
        [[[8750.0, 1250.0], [5000.0, 5000.0]]]
    """
    rows = counts.double() + smoothing / counts.shape[2]
    return (rows / rows.sum(2, keepdim=True)).log()


def stacking_terms(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of a weighted sum of logits, with its two derivatives; all three add up over clients.

    With s = sum_k w_k z_k and p = softmax(s): dL/dw_k = sum (p - y) z_k, and d2L/dw_k dw_l is the covariance of z_k
    and z_l under p, summed over examples.

    Args:
        logits: z, shape ``(n, num_members, num_classes)``.
        labels: shape ``(n,)``.
        weights: w, shape ``(num_members,)``, float64.

    Returns:
        Summed loss ``()``, gradient ``(num_members,)`` and Hessian ``(num_members, num_members)``, float64.
    """
    z = logits.double()
    joint = torch.einsum("nkc,k->nc", z, weights)
    p = joint.softmax(1)
    loss = F.cross_entropy(joint, labels, reduction="sum")
    gradient = torch.einsum("nc,nkc->k", p - F.one_hot(labels, p.shape[1]), z)
    means = torch.einsum("nc,nkc->nk", p, z)
    hessian = torch.einsum("nc,nkc,nlc->kl", p, z, z) - means.T @ means
    return loss, gradient, hessian
