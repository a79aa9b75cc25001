"""The best adapter of a given rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedfuse.core.registry import register_adapter_rule
from fedfuse.ops.lora import Factors, stacked, truncated
from fedfuse.rules.adapters.rule import AdapterRule, FusedChange, check_rank, check_rank_fits


@register_adapter_rule("svd")
@dataclass(frozen=True, kw_only=True)
class Svd(AdapterRule):
    """The adapter of a given rank that is nearest to the exact sum (FlexLoRA, Bai et al., NeurIPS 2024).

    Departures: the paper builds the full matrix and decomposes it; here the stacked factors are decomposed, which gives
    the same singular values for a fraction of the work and memory.

    Args:
        rank: of the result, at least 1 and below every weight's dimensions; ``None`` is the largest of the adapters'.
    """

    rank: int | None = None

    def __post_init__(self) -> None:
        check_rank(self.rank)

    def check_shape(self, module: str, shape: tuple[int, int]) -> None:
        """Refuse a rank that is not low for this weight.

        Args:
            module: its name.
            shape: ``(d_out, d_in)``.
        """
        check_rank_fits(self.rank, module, shape)

    def fuse(self, parts: Sequence[Factors], weights: Sequence[float], module: str) -> FusedChange:
        """Truncate the exact sum.

        Args:
            parts: one per adapter.
            weights: one per adapter.
            module: not used.

        Returns:
            An adapter of the rank, or of the sum's where that is lower.
        """
        rank = self.rank or max(part.rank for part in parts)
        return FusedChange(truncated(stacked(parts, weights), rank))
