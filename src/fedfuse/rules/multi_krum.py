"""The mean of the models that lie closest to their neighbours."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedfuse.core.errors import ConfigError
from fedfuse.core.registry import register_rule
from fedfuse.rules.krum import Krum


@register_rule("multi_krum")
@dataclass(frozen=True, kw_only=True)
class MultiKrum(Krum):
    """The mean of several clients with the lowest scores of Krum (Blanchard et al., NeurIPS 2017); unweighted.

    Args:
        num_hostile: f in the paper, as for ``krum``.
        num_chosen: m in the paper, clients that are averaged; ``None`` is n - f: all but as many as may be hostile.
            More than there are is all of them.
    """

    num_chosen: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_chosen is not None and self.num_chosen < 1:
            raise ConfigError(f"num_chosen is {self.num_chosen}", where="rule.num_chosen", fix="give at least 1")

    def reweigh(self, distances: Tensor, weights: Tensor) -> Tensor:
        """Equal weights for the clients with the lowest scores.

        Args:
            distances: squared, shape ``(num_clients, num_clients)``.
            weights: not used.

        Returns:
            Shape ``(num_clients,)``, sums to 1.

        Raises:
            ModelError: there are too few clients for that many hostile ones.

        Example:
            >>> import torch
            >>> points = torch.tensor([0.0, 1.0, 1.1, 1.2, 900.0]).double()
            >>> MultiKrum(num_hostile=1).reweigh((points[:, None] - points) ** 2, torch.ones(5)).tolist()
            [0.25, 0.25, 0.25, 0.25, 0.0]
        """
        num_clients = len(distances)
        return self.first(distances, self.num_chosen or num_clients - self.tolerated(num_clients))
