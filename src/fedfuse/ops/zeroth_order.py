"""Random directions that a seed stands for, and steps along them that need no gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedfuse.core.seeding import Rng

_BLOCK = 1 << 20
"""Entries that are drawn at once. The stream of numbers depends on it, so it is part of what a seed stands for."""


def shift(parameters: Sequence[Tensor], directions: Rng, number: int, factor: float) -> None:
    """Move tensors along one direction, in place: w + factor z.

    The direction is drawn block by block on the CPU, so it is the same on every machine and takes no memory.

    Args:
        parameters: contiguous, of any shapes, in an order that everyone keeps.
        directions: where all directions come from.
        number: of the direction, from 0; its entries are standard normal.
        factor: how far.

    Example:
        >>> w = [torch.zeros(3), torch.zeros(2, 2)]
        >>> shift(w, Rng(0), 7, 2.0); shift(w, Rng(0), 7, -2.0)
        >>> w[1].tolist()
        [[0.0, 0.0], [0.0, 0.0]]
    """
    draw = directions.torch("direction", number)
    for parameter in parameters:
        for part in parameter.detach().view(-1).split(_BLOCK):
            direction = torch.randn(len(part), generator=draw)
            part.add_(direction.to(part), alpha=factor)


def shift_by_sums(parameters: Sequence[Tensor], directions: Rng, sums: Mapping[int, float], factor: float) -> None:
    """Move tensors along many directions, in place: w + factor sum_s sums_s z_s.

    Args:
        parameters: contiguous.
        directions: where all directions come from.
        sums: number of a direction to what all steps along it add up to.
        factor: minus the learning rate.
    """
    for number in sorted(sums):
        if sums[number]:
            shift(parameters, directions, number, factor * sums[number])


def seed_probabilities(magnitudes: Tensor) -> Tensor:
    """How often each direction is taken, when those along which the loss changed more are to be taken more often.

    The softmax of the mean magnitudes, brought to [0, 1] first.

    Args:
        magnitudes: mean |slope| of each direction so far, shape ``(num_seeds,)``; NaN where it was never taken, which
            counts as the mean of the others.

    Returns:
        Shape ``(num_seeds,)``, float32, sums to 1.

    Example:
        >>> [round(p, 3) for p in seed_probabilities(torch.tensor([0.0, 1.0, 1.0])).tolist()]
        [0.155, 0.422, 0.422]
    """
    known = magnitudes.double()
    taken = ~known.isnan()
    if not bool(taken.any()):
        return torch.full(magnitudes.shape, 1 / len(magnitudes))
    known = torch.where(taken, known, known[taken].mean())
    width = known.max() - known.min()
    return ((known - known.min()) / width.clamp(min=1e-12)).softmax(0).float()
