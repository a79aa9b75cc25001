"""Weighted mean."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedfuse.core.registry import register_rule
from fedfuse.rules.rule import Rule


@register_rule("mean")
@dataclass(frozen=True, kw_only=True)
class Mean(Rule):
    """Weighted mean, accumulated in float64: identical models give that very model."""

    @property
    def is_weighted_sum(self) -> bool:
        """Always: clients are added up one by one."""
        return True

    def fuse(self, stack: Tensor, weights: Tensor) -> Tensor:
        """Sum of weight times value.

        Args:
            stack: shape ``(num_clients, n)``.
            weights: shape ``(num_clients,)``, sums to 1.

        Returns:
            Shape ``(n,)``.

        Example:
            >>> import torch
            >>> Mean().fuse(torch.tensor([[1.0], [4.0]]).double(), torch.tensor([0.25, 0.75]).double()).item()
            3.25
        """
        return weights @ stack
