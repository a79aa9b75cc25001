"""Stacking: the exact sum, as one adapter of the summed rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedfuse.core.registry import register_adapter_rule
from fedfuse.ops.lora import Factors, stacked
from fedfuse.rules.adapters.rule import AdapterRule, FusedChange, within_shape


@register_adapter_rule("flora")
@dataclass(frozen=True, kw_only=True)
class Flora(AdapterRule):
    """The exact weighted sum: factors side by side, so that ranks add up (FLoRA, Wang et al., NeurIPS 2024).

    Departures: A and B are told apart by their names, and not by which of their sides is as long as the rank, as in the
    published code, which confuses them in a narrow weight. Weights and scales are folded into the factors, so that the
    saved scale is 1 and true. Where the ranks add up to more than the weight's smaller dimension, the same sum is
    stored at that dimension.
    """

    is_exact: ClassVar[bool] = True

    def fuse(self, parts: Sequence[Factors], weights: Sequence[float], module: str) -> FusedChange:
        """Put the factors side by side.

        Args:
            parts: one per adapter.
            weights: one per adapter.
            module: not used.

        Returns:
            An adapter of the summed rank.
        """
        return FusedChange(within_shape(stacked(parts, weights)))
