"""The point whose distances to all models sum to the least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError
from fedfuse.core.registry import register_rule
from fedfuse.rules.rule import Rule

# Farther than this many times the usual distance, float64 no longer tells the usual distances from rounding.
_TOO_FAR = 1e8


@register_rule("geometric_median")
@dataclass(frozen=True, kw_only=True)
class GeometricMedian(Rule):
    """The point with the smallest weighted sum of distances to the clients' models (Pillutla et al., TSP 2022).

    The smoothed Weiszfeld algorithm of RFA. Each step is a mean of the models, so the models' distances from each other
    are all that it needs: they are read twice, whatever the number of steps. Hostile clients with less than half of the
    weight cannot move the result far. A model 10^8 times farther away than is usual has no say at all.

    Integers and buffers are averaged with the weights that the floating-point tensors together have found.

    Args:
        num_iterations: most steps, at least 1.
        smoothing: nu in the paper, distances below it count as so much, above 0.
        tolerance: stop when no client's share changes by more, above 0.
    """

    of_whole_models: ClassVar[bool] = True

    num_iterations: int = 1000
    smoothing: float = 1e-6
    tolerance: float = 1e-9

    def __post_init__(self) -> None:
        if self.num_iterations < 1:
            raise ConfigError(
                f"num_iterations is {self.num_iterations}", where="rule.num_iterations", fix="give at least 1"
            )
        for name, value in (("smoothing", self.smoothing), ("tolerance", self.tolerance)):
            if not value > 0:
                raise ConfigError(f"{name} is {value}", where=f"rule.{name}", fix="give a number above 0")

    @property
    def is_weighted_sum(self) -> bool:
        """Always: the median is a mean with weights of its own."""
        return True

    def reweigh(self, distances: Tensor, weights: Tensor) -> Tensor:
        """The weights with which the mean is the geometric median.

        Args:
            distances: squared, shape ``(num_clients, num_clients)``.
            weights: shape ``(num_clients,)``, sums to 1; those of the distances.

        Returns:
            Shape ``(num_clients,)``, sums to 1.

        Example:
            >>> points = torch.tensor([0.0, 1.0, 900.0]).double()
            >>> found = GeometricMedian().reweigh((points[:, None] - points) ** 2, torch.ones(3).double() / 3)
            >>> round((found @ points).item(), 3)
            1.0
        """
        typical = distances.median(1).values
        centre = int(typical.argmin())
        reach = max(float(typical[centre].sqrt()), self.smoothing) * _TOO_FAR
        weights = torch.where(distances[centre].sqrt() <= reach, weights, 0.0)
        if not weights.sum() > 0:
            return weights + 1 / len(weights)
        shares = weights / weights.sum()
        for _ in range(self.num_iterations):
            # From a mean of points: sum_j a_j d_ij^2 - 1/2 sum_jk a_j a_k d_jk^2.
            to_all = distances @ shares
            apart = (to_all - shares @ to_all / 2).clamp(min=0).sqrt()
            pulls = weights / apart.clamp(min=self.smoothing)
            found = pulls / pulls.sum()
            change = (found - shares).abs().max()
            shares = found
            if change <= self.tolerance:
                break
        return shares

    def fuse(self, stack: Tensor, weights: Tensor) -> Tensor:
        """Sum of weight times value.

        Args:
            stack: shape ``(num_clients, n)``.
            weights: those of :meth:`reweigh`.

        Returns:
            Shape ``(n,)``.
        """
        return weights @ stack
