"""Fusion by curvature against solutions that can be redone by hand or by least squares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedfuse.ops.curvature import (
    diagonal_merge,
    gram_merge,
    kronecker_merge,
    logit_gradients,
    scale_off_diagonal,
)

D_IN, D_OUT = 5, 3
SIZES = (20, 35, 50)


def regressions(seed: int = 0) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Three clients' inputs, their own least-squares weights, and those of the pooled data."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(n, D_IN, generator=generator, dtype=torch.float64) for n in SIZES]
    targets = [torch.randn(n, D_OUT, generator=generator, dtype=torch.float64) for n in SIZES]
    own = [torch.linalg.lstsq(x, y).solution.T for x, y in zip(inputs, targets, strict=True)]
    return inputs, own, torch.linalg.lstsq(torch.cat(inputs), torch.cat(targets)).solution.T


def shares() -> Tensor:
    return torch.tensor(SIZES, dtype=torch.float64) / sum(SIZES)


def test_gram_matrices_give_the_pooled_least_squares() -> None:
    inputs, own, pooled = regressions()
    grams = torch.stack([x.T @ x / len(x) for x in inputs])
    torch.testing.assert_close(gram_merge(torch.stack(own), grams, shares()), pooled, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_kronecker_factors_of_a_regression_give_the_pooled_least_squares(seed: int) -> None:
    # The Fisher information of a linear regression is the Kronecker product of X'X and the identity.
    inputs, own, pooled = regressions(seed)
    factors = torch.stack([x.T @ x / len(x) for x in inputs])
    eyes = torch.eye(D_OUT, dtype=torch.float64).expand(3, -1, -1)
    fused = kronecker_merge(torch.stack(own), factors, eyes, shares(), 0.0, tolerance=1e-13)
    torch.testing.assert_close(fused, pooled, rtol=0, atol=1e-10)


def test_a_diagonal_of_a_regression_on_separate_inputs_gives_the_pooled_solution() -> None:
    # y = w x with x = 2 for three examples, and x = 1 for one: w = (3 * 2 * y1 + y2) / (3 * 4 + 1).
    fused = diagonal_merge(
        torch.tensor([[1.0], [5.0]]).double(),
        torch.tensor([[4.0], [1.0]]).double(),
        torch.tensor([0.75, 0.25]).double(),
        0.0,
    )
    assert fused.item() == pytest.approx((3 * 4 * 1.0 + 5.0) / 13)


def test_kronecker_factors_solve_the_normal_equations() -> None:
    generator = torch.Generator().manual_seed(4)

    def moments(d: int) -> Tensor:
        rows = torch.randn(3, 30, d, generator=generator, dtype=torch.float64)
        return rows.mT @ rows / 30

    values = torch.randn(3, D_OUT, D_IN, generator=generator, dtype=torch.float64)
    a, g, p, damping = moments(D_IN), moments(D_OUT), shares(), 0.1
    mean = torch.tensordot(p, values, 1)
    pull = damping * sum(p[i] * (g[i].trace() / D_OUT) * (a[i].trace() / D_IN) for i in range(3))
    # vec(G W A) by rows is (G x A') vec(W).
    system = sum(p[i] * torch.kron(g[i], a[i]) for i in range(3)) + pull * torch.eye(D_OUT * D_IN).double()
    right = sum(p[i] * torch.kron(g[i], a[i]) @ values[i].flatten() for i in range(3)) + pull * mean.flatten()
    wanted = torch.linalg.solve(system, right).reshape(D_OUT, D_IN)
    torch.testing.assert_close(kronecker_merge(values, a, g, p, damping, tolerance=1e-13), wanted, rtol=0, atol=1e-9)


def test_what_no_client_holds_keeps_the_mean() -> None:
    values, p = torch.tensor([[[1.0, 2.0]], [[5.0, 4.0]]]).double(), torch.tensor([0.5, 0.5]).double()
    one_sided = torch.tensor([[[3.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]]).double()
    wanted = [[2.0, 3.0]]
    torch.testing.assert_close(gram_merge(values, one_sided, p), torch.tensor(wanted).double())
    ones = torch.ones(2, 1, 1).double()
    torch.testing.assert_close(kronecker_merge(values, one_sided, ones, p, 0.0), torch.tensor(wanted).double())
    diagonals = one_sided.diagonal(dim1=1, dim2=2)[:, None]
    torch.testing.assert_close(diagonal_merge(values, diagonals, p, 0.0), torch.tensor(wanted).double())


def test_without_any_curvature_all_give_the_mean() -> None:
    values, p = torch.tensor([[[1.0, 2.0]], [[5.0, 4.0]]]).double(), torch.tensor([0.25, 0.75]).double()
    mean = torch.tensor([[4.0, 3.5]]).double()
    zeros = torch.zeros(2, 2, 2).double()
    torch.testing.assert_close(gram_merge(values, zeros, p), mean)
    torch.testing.assert_close(kronecker_merge(values, zeros, torch.zeros(2, 1, 1).double(), p, 0.1), mean)
    torch.testing.assert_close(diagonal_merge(values, torch.zeros_like(values), p, 0.1), mean)


def test_more_damping_is_nearer_to_the_mean() -> None:
    values, p = torch.tensor([[0.0], [4.0]]), torch.tensor([0.5, 0.5])
    fishers = torch.tensor([[3.0], [1.0]])
    found = [diagonal_merge(values, fishers, p, damping).item() for damping in (0.0, 1.0, 1e9)]
    # Without damping (3 * 0 + 1 * 4) / 4; with 1 half of the correction.
    assert found == pytest.approx([1.0, 1.5, 2.0])


def test_off_diagonals_are_scaled() -> None:
    gram = torch.tensor([[2.0, 4.0], [4.0, 6.0]])
    assert scale_off_diagonal(gram, 0.5).tolist() == [[2.0, 2.0], [2.0, 6.0]]
    assert scale_off_diagonal(gram, 1.0).equal(gram)


def test_gradients_of_all_classes_make_the_exact_fisher_information() -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    v = logit_gradients(logits, torch.zeros(4).long(), "all", torch.Generator())
    p = logits.softmax(1)
    wanted = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    torch.testing.assert_close(torch.einsum("cni,cnj->nij", v, v), wanted)


def test_gradients_of_true_labels_are_those_of_the_cross_entropy() -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = torch.tensor([0, 2, 1, 1])
    torch.nn.functional.cross_entropy(logits, y, reduction="sum").backward()
    torch.testing.assert_close(logit_gradients(logits.detach(), y, "true", torch.Generator())[0], logits.grad)


def test_sampled_labels_come_from_the_model() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0]).repeat(20_000, 1)
    v = logit_gradients(logits, torch.zeros(20_000).long(), "sampled", torch.Generator().manual_seed(0))
    p = logits[0].softmax(0)
    found = torch.einsum("cni,cnj->ij", v, v) / 20_000
    torch.testing.assert_close(found, torch.diag(p) - p[:, None] * p, rtol=0, atol=0.01)
