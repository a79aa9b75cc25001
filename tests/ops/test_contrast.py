"""Contrastive losses against a loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from fedfuse.ops.contrast import prototype_contrast, supervised_contrast


def test_a_pair_alone_costs_nothing() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert supervised_contrast(features, torch.tensor([1, 1]), 0.5).item() == 0.0


def test_no_positive_counts_as_zero() -> None:
    assert supervised_contrast(torch.eye(3), torch.arange(3), 0.07).item() == 0.0


def test_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(7, 5, generator=generator))
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 3])
    total = 0.0
    for i in range(7):
        positives = [p for p in range(7) if p != i and labels[p] == labels[i]]
        below = sum(math.exp(float(features[i] @ features[a]) / 0.2) for a in range(7) if a != i)
        for p in positives:
            total -= math.log(math.exp(float(features[i] @ features[p]) / 0.2) / below) / len(positives)
    assert supervised_contrast(features, labels, 0.2).item() == pytest.approx(total / 7, rel=1e-5)


def test_the_gradient_is_finite_and_draws_a_class_together() -> None:
    raw = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]], requires_grad=True)
    labels = torch.tensor([0, 0, 1])
    loss = supervised_contrast(F.normalize(raw), labels, 0.1)
    gradient = torch.autograd.grad(loss, raw)[0]
    assert bool(torch.isfinite(gradient).all())
    assert supervised_contrast(F.normalize(raw - 0.01 * gradient), labels, 0.1) < loss


def test_prototypes_apart_cost_less_than_prototypes_alike() -> None:
    # Equal rows: log 2, whatever their length. Far apart: nothing.
    assert prototype_contrast(torch.ones(2, 3)).item() == pytest.approx(math.log(2))
    assert prototype_contrast(10 * torch.eye(2)).item() == pytest.approx(0.0, abs=1e-6)
