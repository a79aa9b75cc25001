"""The exact sum, added to the base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedfuse.core.registry import register_adapter_rule
from fedfuse.ops.lora import Factors, stacked
from fedfuse.rules.adapters.rule import AdapterRule, FusedChange


@register_adapter_rule("merge")
@dataclass(frozen=True, kw_only=True)
class Merge(AdapterRule):
    """The exact weighted sum, added to the base model's weights: the result is a whole model and no adapter."""

    is_exact: ClassVar[bool] = True
    makes_adapter: ClassVar[bool] = False

    @property
    def residual_goes(self) -> Literal["nowhere", "apart", "base"]:
        """Always into the base."""
        return "base"

    def fuse(self, parts: Sequence[Factors], weights: Sequence[float], module: str) -> FusedChange:
        """Sum the changes.

        Args:
            parts: one per adapter.
            weights: one per adapter.
            module: not used.

        Returns:
            No adapter, and the sum as what is added to the base.
        """
        whole = stacked(parts, weights)
        return FusedChange(Factors(whole.left[:, :0], whole.right[:0]), whole)
