"""The mean of the factors, each apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedfuse.core.registry import register_adapter_rule
from fedfuse.ops.lora import Factors, averaged
from fedfuse.rules.adapters.rule import AdapterRule, FusedChange


@register_adapter_rule("average")
@dataclass(frozen=True, kw_only=True)
class Average(AdapterRule):
    """Mean of all A and mean of all B, apart: small and inexact (FedIT, Zhang et al., ICASSP 2024).

    The product of two means is not the mean of products: it also holds every adapter's B times the others' A. Each
    adapter's own scale goes with its B. Smaller ranks are filled up with zeros (HetLoRA, Cho et al., EMNLP 2024). A
    weight that one adapter alone changes gets that change times the adapter's weight, as in the exact sum.
    """

    @property
    def of_factors(self) -> bool:
        """Always."""
        return True

    def fuse(self, parts: Sequence[Factors], weights: Sequence[float], module: str) -> FusedChange:
        """Average the factors.

        Args:
            parts: one per adapter.
            weights: one per adapter.
            module: not used.

        Returns:
            An adapter of the largest rank.
        """
        return FusedChange(averaged(parts, weights))
