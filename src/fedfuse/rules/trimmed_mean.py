"""Coordinate-wise trimmed mean."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedfuse.core.errors import ConfigError
from fedfuse.core.registry import register_rule
from fedfuse.rules.rule import Rule


@register_rule("trimmed_mean")
@dataclass(frozen=True, kw_only=True)
class TrimmedMean(Rule):
    """Mean of what is left when the smallest and largest values are dropped (Yin et al., ICML 2018); unweighted.

    Args:
        trim_fraction: part of the clients dropped at each end, in [0, 0.5); rounded down to whole clients.
    """

    trim_fraction: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.trim_fraction < 0.5:
            raise ConfigError(
                f"trim_fraction is {self.trim_fraction}", where="rule.trim_fraction", fix="give a fraction in [0, 0.5)"
            )

    def fuse(self, stack: Tensor, weights: Tensor) -> Tensor:
        """Drop the ends of each coordinate and average the rest.

        Args:
            stack: shape ``(num_clients, n)``.
            weights: not used.

        Returns:
            Shape ``(n,)``.

        Example:
            >>> import torch
            >>> stack = torch.tensor([[-900.0], [1.0], [2.0], [3.0], [900.0]]).double()
            >>> TrimmedMean(trim_fraction=0.2).fuse(stack, torch.ones(5)).item()
            2.0
        """
        # One client at least is left, also for a fraction that rounding would take to a half.
        num_dropped = min(int(len(stack) * self.trim_fraction + 1e-9), (len(stack) - 1) // 2)
        return stack.sort(0).values[num_dropped : len(stack) - num_dropped].mean(0)
