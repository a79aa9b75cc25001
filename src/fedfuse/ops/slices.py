"""Narrow tensors as parts of wide ones: what a narrow model holds, and the mean over those who hold a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Packs = Mapping[int, int]
"""Axis to the number of equal packs that lie one after another along it, such as 3 for joined queries, keys, values."""


def is_part(shape: Sequence[int], whole: Sequence[int], packs: Packs | None = None) -> bool:
    """Whether a tensor of one shape is a part of a tensor of another.

    Args:
        shape: of the part.
        whole: of the whole.
        packs: axes along which it is a part of each pack.

    Example:
        >>> is_part((2, 3), (4, 3)), is_part((2, 3), (4, 2)), is_part((6,), (8,), {0: 3})
        (True, False, False)
    """
    if len(shape) != len(whole) or any(a > b for a, b in zip(shape, whole, strict=True)):
        return False
    return all(shape[axis] % num == 0 and whole[axis] % num == 0 for axis, num in (packs or {}).items())


def places(shape: Sequence[int], whole: Sequence[int], packs: Packs | None = None) -> tuple[Tensor, ...]:
    """Where a part lies in the whole: the first places along every axis, or the first of each pack.

    Args:
        shape: of the part.
        whole: of the whole.
        packs: axes along which it is a part of each pack.

    Returns:
        Index tensors that broadcast to the part's shape: ``whole[places]`` is the part.

    Example:
        >>> [p.flatten().tolist() for p in places((2, 4), (3, 8), {1: 2})]
        [[0, 1], [0, 1, 4, 5]]
    """
    found = []
    for axis, (size, full) in enumerate(zip(shape, whole, strict=True)):
        num = (packs or {}).get(axis, 1)
        starts = torch.arange(num) * (full // num)
        index = (starts[:, None] + torch.arange(size // num)).flatten()
        found.append(index.view([-1 if k == axis else 1 for k in range(len(shape))]))
    return tuple(found)


def part_of(whole: Tensor, shape: Sequence[int], packs: Packs | None = None) -> Tensor:
    """The part of a tensor that a narrower model holds, as a copy.

    Args:
        whole: the wide tensor.
        shape: of the part.
        packs: axes along which it is a part of each pack.

    Example:
        >>> part_of(torch.arange(6).view(2, 3), (2, 1)).tolist()
        [[0], [3]]
    """
    return whole[places(shape, whole.shape, packs)].clone()


def mean_where_held(whole: Tensor, parts: Sequence[Tensor], weights: Sequence[float], packs: Packs) -> Tensor:
    """The weighted mean, number by number, over those parts that hold it; what nobody holds stays.

    Args:
        whole: the wide tensor as it was.
        parts: of any sizes up to the whole's.
        weights: one per part, above 0.
        packs: axes along which a part is one of each pack.

    Returns:
        Shape and dtype of the whole; integers are rounded.

    Example:
        >>> narrow, wide = torch.tensor([3.0]), torch.tensor([1.0, 5.0])
        >>> mean_where_held(torch.zeros(3), [narrow, wide], [1.0, 3.0], {}).tolist()
        [1.5, 5.0, 0.0]
    """
    total = torch.zeros(whole.shape, dtype=torch.float64)
    held = torch.zeros(whole.shape, dtype=torch.float64)
    for part, weight in zip(parts, weights, strict=True):
        index = places(part.shape, whole.shape, packs)
        total[index] += weight * part.double()
        held[index] += weight
    mean = torch.where(held > 0, total / held, whole.double())
    return mean.to(whole.dtype) if whole.is_floating_point() else mean.round().to(whole.dtype)
