"""Trim, elect a sign, and average the changes that agree with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError
from fedfuse.core.registry import register_rule
from fedfuse.rules.rule import Rule, Source


@register_rule("ties")
@dataclass(frozen=True, kw_only=True)
class Ties(Rule):
    """The clients' largest changes, averaged where they agree in sign (Yadav et al., NeurIPS 2023, algorithm 1).

    Departures: each tensor is trimmed on its own, not the whole model at once, so that one tensor of each client is in
    memory; a coordinate whose changes cancel exactly stays as it was.

    Args:
        keep_fraction: k in the paper, part of each client's changes that is kept, in (0, 1].
        scaling: lambda in the paper, what the fused change is multiplied by, 0 or more.
    """

    of_differences: ClassVar[bool] = True
    of_whole_tensors: ClassVar[bool] = True

    keep_fraction: float = 0.2
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.keep_fraction <= 1:
            raise ConfigError(
                f"keep_fraction is {self.keep_fraction}", where="rule.keep_fraction", fix="give a fraction in (0, 1]"
            )
        if not self.scaling >= 0:
            raise ConfigError(f"scaling is {self.scaling}", where="rule.scaling", fix="give 0 or more")

    def prepare(self, values: Tensor, source: Source) -> Tensor:
        """Trim: only the largest changes of a client are left.

        Args:
            values: the change, shape ``(n,)``.
            source: not used.

        Returns:
            Shape ``(n,)``, zero where trimmed; equal magnitudes are kept together.
        """
        if not len(values):
            return values
        magnitudes = values.abs()
        num_kept = max(1, round(self.keep_fraction * len(values)))
        threshold = magnitudes.kthvalue(len(values) - num_kept + 1).values
        return torch.where(magnitudes >= threshold, values, 0.0)

    def fuse(self, stack: Tensor, weights: Tensor) -> Tensor:
        """Elect the sign of each coordinate and average the changes that have it.

        Args:
            stack: trimmed changes, shape ``(num_clients, n)``.
            weights: shape ``(num_clients,)``, sums to 1.

        Returns:
            Shape ``(n,)``.

        Example:
            >>> stack = torch.tensor([[4.0], [2.0], [-5.0]], dtype=torch.float64)
            >>> Ties().fuse(stack, torch.full((3,), 1 / 3, dtype=torch.float64)).item()
            3.0
        """
        return self.scaling * disjoint_mean(stack, weights)


def disjoint_mean(stack: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of those values that have the sign of the weighted sum; zeros take no part.

    Args:
        stack: shape ``(num_clients, n)``.
        weights: shape ``(num_clients,)``.

    Returns:
        Shape ``(n,)``; 0 where the sum is.
    """
    elected = torch.sign(weights @ stack)
    agrees = (torch.sign(stack) == elected) & (elected != 0)
    shares = agrees * weights[:, None]
    return (shares * stack).sum(0) / shares.sum(0).clamp(min=torch.finfo(stack.dtype).tiny)
