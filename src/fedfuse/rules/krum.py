"""The one model that lies closest to its neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError, ModelError
from fedfuse.core.registry import register_rule
from fedfuse.rules.rule import Rule


@register_rule("krum")
@dataclass(frozen=True, kw_only=True)
class Krum(Rule):
    """The client whose nearest neighbours are nearest, whole (Blanchard et al., NeurIPS 2017).

    A client's score is the sum of its squared distances to its n - f - 2 nearest others; the lowest wins, of equals the
    first by id. Weights are not looked at. Integers and buffers come from the same client; integers count in no
    distance.

    Args:
        num_hostile: f in the paper, clients that may send anything: the guarantee needs n of at least 2 f + 3. ``None``
            is as many as n clients allow.
    """

    of_whole_models: ClassVar[bool] = True

    num_hostile: int | None = None

    def __post_init__(self) -> None:
        if self.num_hostile is not None and self.num_hostile < 0:
            raise ConfigError(f"num_hostile is {self.num_hostile}", where="rule.num_hostile", fix="give 0 or more")

    @property
    def is_weighted_sum(self) -> bool:
        """Always: with the weight 1 for one client."""
        return True

    def reweigh(self, distances: Tensor, weights: Tensor) -> Tensor:
        """All weight to the client with the lowest score.

        Args:
            distances: squared, shape ``(num_clients, num_clients)``.
            weights: not used.

        Returns:
            Shape ``(num_clients,)``, one 1.

        Raises:
            ModelError: there are too few clients for that many hostile ones.

        Example:
            >>> points = torch.tensor([0.0, 1.0, 1.1, 1.2, 900.0]).double()
            >>> Krum().reweigh((points[:, None] - points) ** 2, torch.ones(5)).tolist()
            [0.0, 0.0, 1.0, 0.0, 0.0]
        """
        return self.first(distances, 1)

    def fuse(self, stack: Tensor, weights: Tensor) -> Tensor:
        """Sum of weight times value.

        Args:
            stack: shape ``(num_clients, n)``.
            weights: those of :meth:`reweigh`.

        Returns:
            Shape ``(n,)``.
        """
        return weights @ stack

    def tolerated(self, num_clients: int) -> int:
        """How many hostile clients are reckoned with.

        Args:
            num_clients: n.

        Raises:
            ModelError: there are too few clients for that many.
        """
        most = max(0, (num_clients - 3) // 2)
        if self.num_hostile is None or num_clients == 1:
            return most
        if num_clients < 2 * self.num_hostile + 3:
            raise ModelError(
                f"{num_clients} clients cannot outvote {self.num_hostile} hostile ones under this rule",
                where="rule.num_hostile",
                fix=f"ask at least {2 * self.num_hostile + 3} clients, or set num_hostile to {most} or less",
            )
        return self.num_hostile

    def first(self, distances: Tensor, num_chosen: int) -> Tensor:
        """Equal weights for those with the lowest scores.

        Args:
            distances: squared, shape ``(num_clients, num_clients)``.
            num_chosen: how many, at least 1.

        Returns:
            Shape ``(num_clients,)``, sums to 1.
        """
        num_clients = len(distances)
        num_nearest = max(1, num_clients - self.tolerated(num_clients) - 2)
        others = distances + torch.diag(torch.full((num_clients,), torch.inf, dtype=distances.dtype))
        scores = others.sort(1).values[:, : min(num_nearest, num_clients - 1)].sum(1)
        chosen = scores.sort(stable=True).indices[:num_chosen]
        weights = torch.zeros(num_clients, dtype=torch.float64)
        weights[chosen] = 1 / len(chosen)
        return weights
