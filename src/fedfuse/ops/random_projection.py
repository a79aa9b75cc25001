"""A vector as a few coordinates along random directions that both sides make from a seed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_ROWS_OF = 1 << 22
"""Entries of directions that are in memory at once. It decides only how often more are drawn, not what is drawn."""


def project(block: Tensor, num_coordinates: int, draw: torch.Generator) -> Tensor:
    """Inner products with random vectors of signs.

    Args:
        block: shape ``(d,)``.
        num_coordinates: K, at least 1.
        draw: decides the directions.

    Returns:
        Float64, shape ``(K,)``.
    """
    values = block.detach().cpu().double()
    return torch.cat([signs @ values for signs in _directions(len(block), num_coordinates, draw)])


def rebuild(coordinates: Tensor, size: int, draw: torch.Generator, *, has_least_error: bool = False) -> Tensor:
    """The vector that coordinates stand for: (1 / K) sum_k c_k v_k.

    The v_k have entries of -1 and 1, so E[v v^T] = I and the result is unbiased; its mean squared distance to x is
    |x|^2 (d - 1) / K. The factor K / (K + d - 1) makes that distance least, at the price of a bias towards 0.

    Args:
        coordinates: c, shape ``(K,)``, with K at least 1.
        size: d, of the vector.
        draw: as in :func:`project`.
        has_least_error: multiply by that factor.

    Returns:
        Float64, shape ``(d,)``.

    Example:
        >>> x = torch.tensor([3.0])
        >>> rebuild(project(x, 2, torch.Generator().manual_seed(1)), 1, torch.Generator().manual_seed(1)).tolist()
        [3.0]
    """
    num, position = len(coordinates), 0
    found = torch.zeros(size, dtype=torch.float64)
    for signs in _directions(size, num, draw):
        found += coordinates[position : position + len(signs)].double() @ signs
        position += len(signs)
    return found / (num + size - 1 if has_least_error else num)


def shares_of(weights: Tensor, total: int) -> Tensor:
    """Divide a number of coordinates over blocks: at least one each, the rest in proportion.

    The error of all blocks together, sum_g |x_g|^2 d_g / K_g, is least for K_g in proportion to |x_g| sqrt(d_g).

    Args:
        weights: at least 0, shape ``(num_blocks,)``.
        total: at least as many as there are blocks.

    Returns:
        Int64, shape ``(num_blocks,)``; sums to ``total``. What does not divide evenly goes to the largest remainders.

    Example:
        >>> shares_of(torch.tensor([3.0, 1.0, 0.0]), 7).tolist()
        [4, 2, 1]
    """
    weights = weights.double()
    even = torch.full_like(weights, 1 / len(weights))
    wanted = (weights / weights.sum() if bool(weights.sum() > 0) else even) * (total - len(weights))
    shares = wanted.floor().long()
    order = (wanted - shares).sort(descending=True, stable=True).indices
    shares[order[: total - len(weights) - int(shares.sum())]] += 1
    return shares + 1


def _directions(size: int, num: int, draw: torch.Generator) -> Iterator[Tensor]:
    """Random signs, float64, shape ``(rows, size)`` at a time: eight of them in each drawn byte."""
    num_bytes = -(-size // 8)
    shifts = torch.arange(8, dtype=torch.uint8)
    rows_at_once = max(1, _ROWS_OF // max(1, size))
    for start in range(0, num, rows_at_once):
        rows = min(rows_at_once, num - start)
        drawn = torch.randint(0, 256, (rows, num_bytes), generator=draw, dtype=torch.uint8)
        bits = ((drawn.unsqueeze(-1) >> shifts) & 1).view(rows, -1)[:, :size]
        yield bits.double() * 2 - 1
