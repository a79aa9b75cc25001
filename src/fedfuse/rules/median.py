"""Coordinate-wise median."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedfuse.core.registry import register_rule
from fedfuse.rules.rule import Rule


@register_rule("median")
@dataclass(frozen=True, kw_only=True)
class Median(Rule):
    """Coordinate-wise median (Yin et al., ICML 2018); weights are not looked at, so size buys no influence."""

    def fuse(self, stack: Tensor, weights: Tensor) -> Tensor:
        """The middle value; the mean of the two middle ones for an even number of clients.

        Args:
            stack: shape ``(num_clients, n)``.
            weights: not used.

        Returns:
            Shape ``(n,)``.

        Example:
            >>> import torch
            >>> Median().fuse(torch.tensor([[1.0], [2.0], [900.0]]).double(), torch.ones(3)).item()
            2.0
        """
        ordered = stack.sort(0).values
        return (ordered[(len(stack) - 1) // 2] + ordered[len(stack) // 2]) / 2
