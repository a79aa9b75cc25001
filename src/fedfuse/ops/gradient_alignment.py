"""Updates that pull a shared tensor in opposite directions, made to agree before they are averaged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def aligned(updates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take from each update what opposes another one.

    Where two updates have a negative inner product, each is projected off the other as that one came; with more than
    two, off one after another in the order of their names. Of two updates neither opposes the other afterwards, and
    updates without a conflict are left to the bit. With more than two, a projection may bring up a new conflict.

    Args:
        updates: name to a change of one and the same tensor, all of one shape.

    Returns:
        Name to update, in the order of the names, float64.

    Example:
        >>> found = aligned({"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([-1.0, 1.0])})
        >>> found["a"].tolist(), found["b"].tolist()
        ([0.5, 0.5], [0.0, 1.0])
    """
    given = {name: updates[name].double() for name in sorted(updates)}
    found = {}
    for name, update in given.items():
        for other, against in given.items():
            if other == name:
                continue
            product = (update * against).sum()
            if product < 0:
                update = update - product / against.square().sum() * against
        found[name] = update
    return found


def mean_update(updates: Mapping[str, Tensor], weights: Mapping[str, float], *, aligns: bool = True) -> Tensor:
    """The weighted mean of updates of one tensor, after their alignment.

    Args:
        updates: name to update, all of one shape.
        weights: name to weight, above 0.
        aligns: whether to align them; else this is the plain mean.

    Returns:
        The mean, float64.

    Example:
        >>> pair = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([-1.0, 1.0])}
        >>> mean_update(pair, {"a": 1.0, "b": 1.0}).tolist()
        [0.25, 0.75]
        >>> mean_update(pair, {"a": 1.0, "b": 1.0}, aligns=False).tolist()
        [0.0, 0.5]
    """
    parts = aligned(updates) if aligns else {name: updates[name].double() for name in sorted(updates)}
    total = sum(weights[name] for name in parts)
    return torch.stack([part * (weights[name] / total) for name, part in parts.items()]).sum(0)


def num_conflicts(updates: Mapping[str, Tensor]) -> int:
    """How many pairs of updates have a negative inner product.

    Args:
        updates: name to update, all of one shape.

    Example:
        >>> num_conflicts({"a": torch.ones(2), "b": -torch.ones(2), "c": torch.tensor([1.0, -1.0])})
        1
    """
    given = [updates[name].double() for name in sorted(updates)]
    return sum(bool((a * b).sum() < 0) for i, a in enumerate(given) for b in given[i + 1 :])
