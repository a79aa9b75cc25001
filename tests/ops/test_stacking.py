"""Combining classifiers: sums that pool, against autograd and by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fedfuse.ops.stacking import confusion_counts, log_likelihoods, stacking_terms


def held_out(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (n,), generator=generator)
    return torch.randn(n, 3, 4, generator=generator), labels


def test_confusion_counts_by_hand() -> None:
    logits = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
    counts = confusion_counts(logits, torch.tensor([0, 0, 1]))
    assert counts.tolist() == [[[2, 0], [0, 1]], [[1, 1], [0, 1]]]
    assert counts.dtype == torch.int32
    assert confusion_counts(torch.zeros(0, 2, 3), torch.zeros(0, dtype=torch.int64)).sum() == 0


def test_a_class_without_examples_says_nothing() -> None:
    p = log_likelihoods(torch.tensor([[[8, 2], [0, 0]]]), 2.0).exp()
    torch.testing.assert_close(p[0], torch.tensor([[9 / 12, 3 / 12], [0.5, 0.5]], dtype=torch.float64))


@settings(max_examples=20, deadline=None)
@given(n=st.integers(0, 40), cut=st.integers(0, 40), seed=st.integers(0, 100))
def test_sums_of_parts_are_the_sum_of_the_whole(n: int, cut: int, seed: int) -> None:
    logits, labels = held_out(n, seed)
    weights = torch.tensor([0.5, -0.2, 1.0], dtype=torch.float64)
    parts = [(logits[:cut], labels[:cut]), (logits[cut:], labels[cut:])]
    assert torch.equal(sum(confusion_counts(*p) for p in parts), confusion_counts(logits, labels))
    for first, second, whole in zip(
        *(stacking_terms(*p, weights) for p in parts), stacking_terms(logits, labels, weights), strict=True
    ):
        torch.testing.assert_close(first + second, whole)


def test_derivatives_are_autograds() -> None:
    logits, labels = held_out(30)
    weights = torch.tensor([0.5, -0.2, 1.0], dtype=torch.float64)

    def loss(w: Tensor) -> Tensor:
        return F.cross_entropy(torch.einsum("nkc,k->nc", logits.double(), w), labels, reduction="sum")

    value, gradient, hessian = stacking_terms(logits, labels, weights)
    torch.testing.assert_close(value, loss(weights))
    torch.testing.assert_close(gradient, torch.autograd.functional.jacobian(loss, weights))
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(loss, weights))


def test_a_single_example_by_hand() -> None:
    # One member, weight 1, logits (1, 0): p = s(1); L = -log p, L' = (p - 1), L'' = p (1 - p).
    p = torch.sigmoid(torch.tensor(1.0)).item()
    loss, gradient, hessian = stacking_terms(torch.tensor([[[1.0, 0.0]]]), torch.tensor([0]), torch.ones(1).double())
    assert loss.item() == pytest.approx(-torch.tensor(p).log().item())
    assert gradient.tolist() == pytest.approx([p - 1])
    assert hessian.item() == pytest.approx(p * (1 - p))
