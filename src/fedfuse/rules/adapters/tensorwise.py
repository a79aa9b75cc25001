"""Rules for any tensors, used on the changes that adapters make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedfuse.core.seeding import Rng
from fedfuse.ops.lora import Factors, stacked, truncated, truncated_matrix
from fedfuse.rules.adapters.rule import AdapterRule, FusedChange, check_rank, check_rank_fits
from fedfuse.rules.dare import Dare
from fedfuse.rules.rule import Rule, Source
from fedfuse.rules.task_arithmetic import TaskArithmetic
from fedfuse.rules.ties import Ties

_CHUNK_BYTES = 64 << 20
_STEP = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Tensorwise(AdapterRule):
    """A rule such as ties, dare, slerp or krum, on adapters.

    On ``deltas`` the rule sees each adapter's change of the weight as a full matrix, and the nearest change of low rank
    to what it makes of them is kept. Rules that are weighted sums are computed from the factors alone. On ``factors``
    the rule sees the left and the right factors apart, as PEFT's own combinations do; smaller ranks are filled up with
    zeros.

    Memory: with rules of whole tensors (slerp, karcher, ties) one full matrix of each adapter; with others a few.

    Args:
        rule: the rule. What it takes for differences from a base are the changes.
        on: ``deltas`` or ``factors``.
        rank: of the result on deltas; ``None`` is the largest of the adapters'.
        seed: decides the start of the search for the nearest change of low rank, for wide weights.
    """

    rule: Rule
    on: Literal["deltas", "factors"] = "deltas"
    rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_rank(self.rank)

    @property
    def of_factors(self) -> bool:
        """As the setting says."""
        return self.on == "factors"

    @property
    def of_whole_models(self) -> bool:
        """As the rule says."""
        return self.rule.of_whole_models

    def reweigh(self, distances: Tensor, weights: Tensor) -> Tensor:
        """What the rule makes of the weights.

        Args:
            distances: squared, shape ``(num_adapters, num_adapters)``.
            weights: shape ``(num_adapters,)``, sums to 1.

        Returns:
            Shape ``(num_adapters,)``.
        """
        return self.rule.reweigh(distances, weights)

    def check_shape(self, module: str, shape: tuple[int, int]) -> None:
        """Refuse a rank that is not low for this weight.

        Args:
            module: its name.
            shape: ``(d_out, d_in)``.
        """
        check_rank_fits(self.rank, module, shape)

    def fuse(self, parts: Sequence[Factors], weights: Sequence[float], module: str) -> FusedChange:
        """Fuse by the rule.

        Args:
            parts: one per adapter.
            weights: one per adapter.
            module: names the rule's random choices.

        Returns:
            An adapter of the rank.
        """
        most = max(part.rank for part in parts)
        if self.on == "factors":
            left = torch.stack([_padded(part.left, 1, most) for part in parts])
            right = torch.stack([_padded(part.right, 0, most) for part in parts])
            return FusedChange(
                Factors(
                    _fused(self.rule, left, weights, f"{module}.left"),
                    _fused(self.rule, right, weights, f"{module}.right"),
                )
            )
        rank = self.rank or most
        factor = self._linear_factor(len(parts))
        if factor is not None:
            return FusedChange(truncated(stacked(parts, [factor * weight for weight in weights]), rank))
        matrix = self._full(parts, weights, module)
        return FusedChange(truncated_matrix(matrix, rank, Rng(self.seed).torch("svd", module)))

    def _linear_factor(self, num_adapters: int) -> float | None:
        """What a rule that is a weighted sum of the changes multiplies them by; nothing for other rules."""
        if isinstance(self.rule, TaskArithmetic):
            return 1.0 if self.rule.scaling is None else self.rule.scaling * num_adapters
        prepares = type(self.rule).prepare is not Rule.prepare
        return 1.0 if self.rule.is_weighted_sum and not prepares else None

    def _full(self, parts: Sequence[Factors], weights: Sequence[float], module: str) -> Tensor:
        height, width = parts[0].shape
        if self.rule.is_weighted_sum:
            total = torch.zeros(height, width, dtype=torch.float64)
            for position, (part, weight) in enumerate(zip(parts, weights, strict=True)):
                if weight != 0:
                    source = Source(module, position, len(parts))
                    total.view(-1).add_(self.rule.prepare(part.product().view(-1), source), alpha=weight)
            return total
        # The rows of a change need the same rows of the left factor only.
        step = height if self.rule.of_whole_tensors else max(1, _CHUNK_BYTES // (8 * width * len(parts)))
        blocks = []
        for start in range(0, height, step):
            stack = torch.empty(len(parts), min(step, height - start), width, dtype=torch.float64)
            for matrix, part in zip(stack, parts, strict=True):
                torch.mm(part.left[start : start + step], part.right, out=matrix)
            blocks.append(_fused(self.rule, stack, weights, module))
        return torch.cat(blocks)


def _fused(rule: Rule, stack: Tensor, weights: Sequence[float], name: str) -> Tensor:
    """A rule on one tensor of all adapters; the stack is written over."""
    rows = stack.view(len(stack), -1)
    for position in range(len(rows)):
        rows[position] = rule.prepare(rows[position], Source(name, position, len(rows)))
    shares = torch.tensor(weights, dtype=torch.float64)
    # These look at whole tensors when they prepare them, and at single elements when they fuse them.
    step = _STEP if isinstance(rule, Ties | Dare) else max(1, rows.shape[1])
    fused = [rule.fuse(rows[:, start : start + step], shares) for start in range(0, rows.shape[1], step)]
    return torch.cat(fused).view(stack.shape[1:])


def _padded(factor: Tensor, dimension: int, size: int) -> Tensor:
    shape = list(factor.shape)
    shape[dimension] = size - shape[dimension]
    return torch.cat([factor, factor.new_zeros(shape)], dimension)
