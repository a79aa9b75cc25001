"""Riemannian mean on the sphere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError
from fedfuse.core.registry import register_rule
from fedfuse.rules.rule import Rule


@register_rule("karcher")
@dataclass(frozen=True, kw_only=True)
class Karcher(Rule):
    """Each tensor's direction is the mean on the sphere (Karcher, 1977) and its length the mean length.

    The mean of directions minimises the weighted sum of squared angles; it is found by gradient descent from the
    direction of the straight mean, with inner products of the clients only.

    Args:
        num_iterations: most steps, at least 1.
        tolerance: stop when a step turns by fewer radians, above 0.
    """

    of_whole_tensors: ClassVar[bool] = True

    num_iterations: int = 100
    tolerance: float = 1e-10

    def __post_init__(self) -> None:
        if self.num_iterations < 1:
            raise ConfigError(
                f"num_iterations is {self.num_iterations}", where="rule.num_iterations", fix="give at least 1"
            )
        if not self.tolerance > 0:
            raise ConfigError(f"tolerance is {self.tolerance}", where="rule.tolerance", fix="give a number above 0")

    def fuse(self, stack: Tensor, weights: Tensor) -> Tensor:
        """Mean direction times mean length.

        Args:
            stack: whole tensors, shape ``(num_clients, n)``; zero ones count in the length only.
            weights: shape ``(num_clients,)``, sums to 1.

        Returns:
            Shape ``(n,)``; the straight mean where directions cancel.

        Example:
            >>> stack = torch.tensor([[2.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
            >>> [round(v, 4) for v in Karcher().fuse(stack, torch.tensor([0.5, 0.5]).double()).tolist()]
            [2.1213, 2.1213]
        """
        lengths = stack.norm(dim=1)
        counts = weights * (lengths > 0)
        if not counts.sum() > 0:
            return weights @ stack
        inverse = torch.where(lengths > 0, 1 / lengths.clamp(min=torch.finfo(stack.dtype).tiny), 0.0)
        inner = (stack @ stack.T) * inverse[:, None] * inverse
        coefficients = self._direction(inner, counts / counts.sum())
        if coefficients is None:
            return weights @ stack
        direction = (coefficients * inverse) @ stack
        return direction.mul_(weights @ lengths)

    def _direction(self, inner: Tensor, shares: Tensor) -> Tensor | None:
        """Coefficients of the mean direction in the clients' unit vectors, from their inner products."""
        length = (shares @ inner @ shares).clamp(min=0).sqrt()
        if length < 1e-9:
            return None
        mean = shares / length
        for _ in range(self.num_iterations):
            cosines = (inner @ mean).clamp(-1, 1)
            angles = cosines.acos()
            sines = angles.sin()
            # angle / sin(angle) is 1 at 0; at pi, where every way round is equally far, a client does not pull.
            factors = torch.where(sines > 1e-7, angles / sines.clamp(min=1e-7), (cosines > 0).to(sines.dtype))
            pull = shares * factors
            step = pull - (pull @ cosines) * mean
            turn = (step @ inner @ step).clamp(min=0).sqrt()
            if turn < self.tolerance:
                break
            mean = turn.cos() * mean + turn.sin() / turn * step
            mean = mean / (mean @ inner @ mean).sqrt()
        return mean
