"""Drop changes at random and rescale the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError
from fedfuse.core.registry import register_rule
from fedfuse.core.seeding import Rng
from fedfuse.rules.rule import Rule, Source
from fedfuse.rules.ties import disjoint_mean


@register_rule("dare")
@dataclass(frozen=True, kw_only=True)
class Dare(Rule):
    """The clients' changes, most dropped at random and the rest rescaled (Yu et al., ICML 2024).

    What is dropped is derived from the seed, the tensor's name and the client's position in the order of ids: it does
    not depend on the order of arrival, but does change when a client is missing.

    Args:
        drop_fraction: p in the paper, probability that a change is dropped, in [0, 1). The paper's 0.9 is for small
            changes of pre-trained models.
        combine: ``mean`` of what is left, or ``ties``: its mean where signs agree, without trimming.
        seed: where the random choices start.
    """

    of_differences: ClassVar[bool] = True
    of_whole_tensors: ClassVar[bool] = True

    drop_fraction: float = 0.5
    combine: Literal["mean", "ties"] = "mean"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.drop_fraction < 1:
            raise ConfigError(
                f"drop_fraction is {self.drop_fraction}", where="rule.drop_fraction", fix="give a fraction in [0, 1)"
            )

    @property
    def is_weighted_sum(self) -> bool:
        """Whether the rest is averaged."""
        return self.combine == "mean"

    def prepare(self, values: Tensor, source: Source) -> Tensor:
        """Drop and rescale, so that the expected change stays the same.

        Args:
            values: the change, shape ``(n,)``.
            source: names the random choice.

        Returns:
            Shape ``(n,)``.
        """
        generator = Rng(self.seed).torch("dare", source.name, source.position)
        is_kept = torch.rand(len(values), generator=generator) >= self.drop_fraction
        return values * is_kept / (1 - self.drop_fraction)

    def fuse(self, stack: Tensor, weights: Tensor) -> Tensor:
        """Average what is left.

        Args:
            stack: rescaled changes, shape ``(num_clients, n)``.
            weights: shape ``(num_clients,)``, sums to 1.

        Returns:
            Shape ``(n,)``.

        Example:
            >>> stack = torch.tensor([[4.0], [-2.0]], dtype=torch.float64)
            >>> [Dare(combine=c).fuse(stack, torch.tensor([0.5, 0.5]).double()).item() for c in ("mean", "ties")]
            [1.0, 4.0]
        """
        return disjoint_mean(stack, weights) if self.combine == "ties" else weights @ stack
