"""Spherical linear interpolation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedfuse.core.registry import register_rule
from fedfuse.rules.rule import Rule

# Below this angle, in radians, or this far from opposite, the arc is not told from the chord.
_SMALLEST_ANGLE = 1e-6


@register_rule("slerp")
@dataclass(frozen=True, kw_only=True)
class Slerp(Rule):
    """Each tensor moves along the arc between the clients' (Shoemake, SIGGRAPH 1985), so that its length is kept.

    Two clients are joined exactly. More are joined one after the other in the order of their ids, each with its share
    of the weight so far; then the result depends on that order. ``karcher`` is the mean that does not.
    """

    of_whole_tensors: ClassVar[bool] = True

    def fuse(self, stack: Tensor, weights: Tensor) -> Tensor:
        """Join the clients one by one.

        Args:
            stack: whole tensors, shape ``(num_clients, n)``.
            weights: shape ``(num_clients,)``, sums to 1.

        Returns:
            Shape ``(n,)``.

        Example:
            >>> import torch
            >>> stack = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
            >>> [round(v, 4) for v in Slerp().fuse(stack, torch.tensor([0.5, 0.5]).double()).tolist()]
            [0.7071, 0.7071]
        """
        shares = weights.tolist()
        joined, weight = stack[0], shares[0]
        for values, share in zip(stack[1:], shares[1:], strict=True):
            weight += share
            if share > 0:
                joined = arc(joined, values, share / weight)
        return joined


def arc(start: Tensor, stop: Tensor, fraction: float) -> Tensor:
    """A point on the arc between two vectors; on the straight line where they are parallel, opposite or zero.

    Args:
        start: shape ``(n,)``.
        stop: shape ``(n,)``.
        fraction: of the way, in [0, 1].

    Returns:
        Shape ``(n,)``.
    """
    lengths = start.norm() * stop.norm()
    if lengths > 0:
        angle = ((start @ stop) / lengths).clamp(-1, 1).acos()
        if angle.sin() > _SMALLEST_ANGLE:
            joined: Tensor = (((1 - fraction) * angle).sin() * start + (fraction * angle).sin() * stop) / angle.sin()
            return joined
    return start.lerp(stop, fraction)
