"""Scaled sum of the clients' changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedfuse.core.errors import ConfigError
from fedfuse.core.registry import register_rule
from fedfuse.rules.rule import Rule, Source


@register_rule("task_arithmetic")
@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Rule):
    """The common first weights plus a scaled sum of the clients' changes (Ilharco et al., ICLR 2023).

    Args:
        scaling: lambda in the paper, what the sum of all changes is multiplied by, 0 or more; ``None`` is one over the
            number of clients, which is their mean.
    """

    of_differences: ClassVar[bool] = True

    scaling: float | None = None

    def __post_init__(self) -> None:
        if self.scaling is not None and not self.scaling >= 0:
            raise ConfigError(f"scaling is {self.scaling}", where="rule.scaling", fix="give 0 or more")

    @property
    def is_weighted_sum(self) -> bool:
        """Always: clients are added up one by one."""
        return True

    def prepare(self, values: Tensor, source: Source) -> Tensor:
        """Scale one client's change, so that the weighted mean of all is the scaled sum.

        Args:
            values: the change, shape ``(n,)``.
            source: says how many clients there are.

        Returns:
            Shape ``(n,)``.
        """
        return values if self.scaling is None else values * (self.scaling * source.num_clients)

    def fuse(self, stack: Tensor, weights: Tensor) -> Tensor:
        """Sum of weight times scaled change.

        Args:
            stack: shape ``(num_clients, n)``.
            weights: shape ``(num_clients,)``, sums to 1.

        Returns:
            Shape ``(n,)``.

        Example:
            >>> import torch
            >>> rule = TaskArithmetic(scaling=0.5)
            >>> rows = [rule.prepare(torch.tensor([v]).double(), Source("w", i, 2)) for i, v in enumerate((1.0, 3.0))]
            >>> rule.fuse(torch.stack(rows), torch.tensor([0.5, 0.5]).double()).item()
            2.0
        """
        return weights @ stack
