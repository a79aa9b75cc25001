"""Low-rank changes of weights, fused without ever building a full matrix. Everything in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Inner products of factors give a norm with half of the digits that a QR decomposition gives, several times faster.
_SMALLEST_OF_GRAM = 1e-8
# Smaller matrices are decomposed whole; of larger ones only the wanted part is.
_LARGEST_WHOLE = 512
_OVERSAMPLING = 16
_NUM_ITERATIONS = 8


def is_finite(values: Tensor) -> bool:
    """Whether there is neither NaN nor infinity in a tensor.

    Args:
        values: any shape, floating point.

    Returns:
        Whether all are numbers; a sum tells nearly always, several times faster than a look at each.

    Example:
        >>> is_finite(torch.ones(3)), is_finite(torch.tensor([1.0, -torch.inf, torch.inf]))
        (True, False)
    """
    # A sum may also overflow.
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


@dataclass(frozen=True)
class Factors:
    """A change of one weight, as the product of two thin matrices.

    Args:
        left: B in the papers, with the adapter's scale in it; shape ``(d_out, rank)``, float64. The rank may be 0,
            which is no change.
        right: A in the papers, shape ``(rank, d_in)``, float64.
    """

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """Columns of the left factor."""
        return self.left.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the product."""
        return self.left.shape[0], self.right.shape[1]

    def product(self) -> Tensor:
        """The full matrix, shape ``(d_out, d_in)``."""
        return self.left @ self.right


def scaling(alpha: float, rank: int, *, is_rank_stabilised: bool) -> float:
    """What an adapter's product is multiplied by: alpha / r, or alpha / sqrt(r) for rsLoRA.

    Args:
        alpha: ``lora_alpha``.
        rank: of the adapter, at least 1.
        is_rank_stabilised: ``use_rslora``.

    Returns:
        The scale s of s B A.

    Example:
        >>> scaling(16, 4, is_rank_stabilised=False), scaling(16, 4, is_rank_stabilised=True)
        (4.0, 8.0)
    """
    return alpha / (math.sqrt(rank) if is_rank_stabilised else rank)


def stacked(parts: Sequence[Factors], coefficients: Sequence[float]) -> Factors:
    """The weighted sum of changes, exactly: their factors side by side (FLoRA, Wang et al., NeurIPS 2024).

    Args:
        parts: at least one; ranks may differ.
        coefficients: one per part; they go into the right factors. Parts with 0 are left out.

    Returns:
        Factors whose rank is the sum of the ranks.

    Example:
        >>> one = Factors(torch.ones(2, 1).double(), torch.ones(1, 3).double())
        >>> stacked([one, one], [0.25, 0.5]).product()[0].tolist()
        [0.75, 0.75, 0.75]
    """
    used = [(part, weight) for part, weight in zip(parts, coefficients, strict=True) if weight != 0 and part.rank]
    if not used:
        return Factors(parts[0].left[:, :0], parts[0].right[:0])
    right = torch.empty(sum(part.rank for part, _ in used), parts[0].shape[1], dtype=torch.float64)
    start = 0
    for part, weight in used:
        torch.mul(part.right, weight, out=right[start : start + part.rank])
        start += part.rank
    return Factors(torch.cat([part.left for part, _ in used], 1), right)


def averaged(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Mean of the left and mean of the right factors, each apart; smaller ranks are filled up with zeros.

    This is not the mean of the changes: it also multiplies each part's left with the others' right factors. Parts of
    rank 0 count as zero in the mean of the left factors and not at all in that of the right ones, so that the change
    of a single part keeps its weight.

    Args:
        parts: at least one; ranks may differ.
        weights: one per part, sum to 1.

    Returns:
        Factors of the largest rank.

    Example:
        >>> half = Factors(torch.ones(1, 1).double(), torch.zeros(1, 1).double())
        >>> other = Factors(torch.zeros(1, 1).double(), torch.ones(1, 1).double())
        >>> averaged([half, other], [0.5, 0.5]).product().item()  # the mean of two zeros
        0.25
    """
    rank = max(part.rank for part in parts)
    left, right = (
        torch.zeros(size, dtype=torch.float64) for size in ((parts[0].shape[0], rank), (rank, parts[0].shape[1]))
    )
    held = math.fsum(weight for part, weight in zip(parts, weights, strict=True) if part.rank)
    for part, weight in zip(parts, weights, strict=True):
        if weight != 0 and part.rank:
            left[:, : part.rank] += weight * part.left
            right[: part.rank] += weight / held * part.right
    return Factors(left, right)


def truncated(factors: Factors, rank: int) -> Factors:
    """The nearest change of a lower rank, in the Frobenius norm (Eckart and Young, 1936).

    A QR decomposition of both factors leaves a matrix as small as their rank, and only that one is decomposed into
    singular values: d R^2 operations for width d and rank R.

    Args:
        factors: the change.
        rank: at least 0; more than the change has costs nothing and adds nothing.

    Returns:
        Balanced factors of that rank, or of the change's own where that is lower.

    Example:
        >>> wide = Factors(torch.eye(3).double(), torch.diag(torch.tensor([3.0, 2.0, 1.0])).double())
        >>> truncated(wide, 2).product().diag().round(decimals=9).tolist()
        [3.0, 2.0, 0.0]
    """
    u, s, vh = decomposed(factors, rank)
    roots = s.sqrt()
    return Factors(u * roots, roots[:, None] * vh)


def decomposed(factors: Factors, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of a change, and their vectors, without building it.

    Args:
        factors: the change.
        rank: how many, at least 0; there are no more than the factors' own rank and the smaller dimension.

    Returns:
        Left vectors, shape ``(d_out, rank)``; values, shape ``(rank,)``, the largest first; right vectors, shape
        ``(rank, d_in)``. Vectors are orthonormal also where values are 0.

    Example:
        >>> wide = Factors(torch.eye(3).double(), torch.diag(torch.tensor([1.0, 3.0, 2.0])).double())
        >>> decomposed(wide, 2)[1].round(decimals=9).tolist()
        [3.0, 2.0]
    """
    q_left, r_left = torch.linalg.qr(factors.left)
    q_right, r_right = torch.linalg.qr(factors.right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return q_left @ u[:, :rank], s[:rank], vh[:rank] @ q_right.T


def compressed(factors: Factors, tolerance: float = 1e-14) -> Factors:
    """The same change with the lowest rank that it can have; singular values that are rounding are dropped.

    Args:
        factors: the change.
        tolerance: largest singular value that counts as rounding, relative to the product of the factors' norms.

    Returns:
        Balanced factors; of rank 0 where the change is zero beside its factors.
    """
    found = truncated(factors, factors.rank)
    values = found.left.square().sum(0)
    scale = float(factors.left.norm() * factors.right.norm())
    num_kept = int((values > tolerance * max(scale, torch.finfo(torch.float64).tiny)).sum())
    return Factors(found.left[:, :num_kept], found.right[:num_kept])


def truncated_matrix(matrix: Tensor, rank: int, generator: torch.Generator) -> Factors:
    """A change of low rank near a full matrix.

    Small matrices are decomposed whole. Of large ones the leading part is found by subspace iteration from a random
    start (Halko, Martinsson and Tropp, SIAM Review 2011, algorithm 4.4).

    Args:
        matrix: shape ``(d_out, d_in)``, float64.
        rank: at least 0.
        generator: decides the random start.

    Returns:
        Balanced factors.
    """
    width = rank + _OVERSAMPLING
    if min(matrix.shape) <= max(_LARGEST_WHOLE, 2 * width):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        roots = s[:rank].sqrt()
        return Factors(u[:, :rank] * roots, roots[:, None] * vh[:rank])
    start = torch.randn(matrix.shape[1], width, dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(_NUM_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    return truncated(Factors(basis, basis.T @ matrix), rank)


def product_norm(left: Tensor, right: Tensor) -> float:
    """Frobenius norm of a product of two thin matrices, without building it.

    Args:
        left: shape ``(d_out, rank)``, float64.
        right: shape ``(rank, d_in)``, float64.

    Returns:
        The norm; what is small because parts cancel is as exact as what is not.

    Example:
        >>> product_norm(torch.tensor([[3.0], [4.0]]).double(), torch.tensor([[1.0, 0.0]]).double())
        5.0
    """
    grams = left.T @ left, right @ right.T
    square = float((grams[0] * grams[1]).sum())
    scale = float(grams[0].norm() * grams[1].norm())
    if square > _SMALLEST_OF_GRAM * scale:
        return math.sqrt(square)
    if scale == 0 or not math.isfinite(scale):
        return scale
    return float((torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right.T, mode="r").R.T).norm())


def inner_product(first: Factors, second: Factors) -> float:
    """Sum of the elementwise product of two changes, without building them.

    Args:
        first: a change.
        second: one of the same shape.

    Returns:
        The inner product.
    """
    return float(((first.left.T @ second.left) * (first.right @ second.right.T)).sum())


def norm(factors: Factors) -> float:
    """Frobenius norm of a change.

    Args:
        factors: the change.

    Returns:
        The norm.
    """
    return product_norm(factors.left, factors.right)


def distance(first: Factors, second: Factors) -> float:
    """Frobenius norm of the difference of two changes.

    Args:
        first: a change.
        second: one of the same shape.

    Returns:
        The norm; exact to the last digits also where both are nearly the same.

    Example:
        >>> one = Factors(torch.ones(2, 1).double(), torch.ones(1, 2).double())
        >>> distance(one, Factors(one.left, 3 * one.right))
        4.0
    """
    if first.left.shape == second.left.shape and torch.equal(first.left, second.left):
        return product_norm(first.left, first.right - second.right)
    return product_norm(torch.cat([first.left, second.left], 1), torch.cat([first.right, -second.right]))


def residual(parts: Sequence[Factors], weights: Sequence[float], other: Factors) -> Factors:
    """What is missing from a change to the exact weighted sum (FedEx-LoRA, Singhal et al., ACL 2025).

    Args:
        parts: the changes that were to be summed.
        weights: one per part.
        other: what came out instead.

    Returns:
        Balanced factors, of the lowest rank that they can have.
    """
    whole = stacked(parts, weights)
    return compressed(Factors(torch.cat([whole.left, other.left], 1), torch.cat([whole.right, -other.right])))
