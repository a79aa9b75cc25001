"""The mean of the factors, and what it misses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedfuse.core.registry import register_adapter_rule
from fedfuse.ops.lora import Factors, averaged, residual, stacked
from fedfuse.rules.adapters.rule import AdapterRule, FusedChange, within_shape


@register_adapter_rule("fedex")
@dataclass(frozen=True, kw_only=True)
class FedEx(AdapterRule):
    """Averaged factors plus the exact rest, which belongs to the base model (FedEx-LoRA, Singhal et al., ACL 2025).

    The paper adds the rest to the frozen weights, so that training goes on with an adapter of the old rank. ``merged``
    does so, ``apart`` writes the rest as an adapter of its own that anybody can merge. ``stacked`` puts both into one
    adapter, which then is exact by itself and has a higher rank than ``flora``'s.

    Args:
        residual: where the rest goes: ``stacked``, ``apart`` or ``merged``, which needs the base's weights.
    """

    is_exact: ClassVar[bool] = True

    residual: Literal["stacked", "apart", "merged"] = "stacked"

    @property
    def residual_goes(self) -> Literal["nowhere", "apart", "base"]:
        """As the setting says."""
        places: dict[str, Literal["nowhere", "apart", "base"]] = {"apart": "apart", "merged": "base"}
        return places.get(self.residual, "nowhere")

    def fuse(self, parts: Sequence[Factors], weights: Sequence[float], module: str) -> FusedChange:
        """Average the factors and find the rest.

        Args:
            parts: one per adapter.
            weights: one per adapter.
            module: not used.

        Returns:
            An adapter of the largest rank and the rest, or both in one.
        """
        mean = averaged(parts, weights)
        rest = residual(parts, weights, mean)
        if self.residual == "stacked":
            return FusedChange(within_shape(stacked([mean, rest], [1.0, 1.0])))
        return FusedChange(mean, rest)
