"""What every rule would make of the same adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedfuse.core.errors import ConfigError, FedfuseError
from fedfuse.core.registry import ADAPTER_RULES, RULES
from fedfuse.fusing.adapters import adapter_rule
from fedfuse.fusing.fusion import Fusion, open_fusion
from fedfuse.fusing.measuring import ModuleError, measure, total
from fedfuse.ops.lora import stacked
from fedfuse.rules.adapters import AdapterRule


@dataclass(frozen=True)
class RuleRow:
    """One rule on these adapters.

    Args:
        method: the rule's name.
        error: distance from the exact sum, before rounding; nothing where the rule cannot be used.
        largest_rank: of the result.
        num_parameters: of the result, without what is saved whole.
        reason: why the rule cannot be used.
    """

    method: str
    error: ModuleError | None
    largest_rank: int = 0
    num_parameters: int = 0
    reason: str = ""


def compare_rules(
    paths: Sequence[str | Path],
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    base_model: str = "",
    methods: Sequence[str] = (),
    progress: Callable[[str], None] = lambda method: None,
) -> list[RuleRow]:
    """Fuse adapters by every rule, write nothing, and measure the distance from the exact weighted sum.

    Args:
        paths: folders of adapters, or names on the hub.
        weights: one per path, equal if left out.
        rank: of the result, for the rules that choose one.
        base_model: name of the base model, where the adapters call it by different ones.
        methods: names of rules; all if left out.
        progress: called with the name of each rule before its work.

    Returns:
        One row per rule, the nearest first; those that cannot be used come last.
    """
    rows = []
    with open_fusion(paths, weights, base_model=base_model) as fusion:
        # Merging is the exact sum, written into the base model instead of an adapter.
        for method in methods or [*(name for name in ADAPTER_RULES.names() if name != "merge"), *RULES.names()]:
            progress(method)
            try:
                rows.append(_row(fusion, method, _rule(method, rank)))
            except FedfuseError as error:
                rows.append(RuleRow(method, None, reason=error.what))
    return sorted(rows, key=lambda row: (row.error is None, 0.0 if row.error is None else row.error.relative))


def _rule(method: str, rank: int | None) -> AdapterRule:
    try:
        return adapter_rule(method, rank)
    except ConfigError:
        # One that chooses no rank.
        return adapter_rule(method)


def _row(fusion: Fusion, method: str, rule: AdapterRule) -> RuleRow:
    fusion.check_rule(rule)
    weights = fusion.reweighed(rule)
    errors, largest, num_parameters = {}, 0, 0
    for module in fusion.modules:
        parts = fusion.parts(module)
        change = rule.fuse(parts, weights, module)
        found = [change.adapter] if change.residual is None else [change.adapter, change.residual]
        errors[module] = measure(stacked(parts, fusion.weights), stacked(found, [1.0] * len(found)))
        largest = max(largest, *(part.rank for part in found))
        num_parameters += sum(part.left.numel() + part.right.numel() for part in found)
    return RuleRow(method, total(errors), largest, num_parameters)
