"""Clients of very different sizes, with alike labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedfuse.core.registry import register_partition
from fedfuse.data.checks import check_at_least, check_positive
from fedfuse.data.partitions.assignment import check_enough, named
from fedfuse.data.splitting import share_out


@register_partition("quantity_skew")
@dataclass(frozen=True, kw_only=True)
class QuantitySkew:
    """Shuffled data in parts whose sizes are skewed by one Dirichlet draw.

    Every client first gets its minimum; the rest is shared out by the draw. So it always ends.

    Args:
        num_clients: at least 1.
        dirichlet_alpha: concentration of the sizes, above 0; small is skewed.
        min_examples: fewest examples of a client, at least 1.

    Raises:
        ConfigError: a value cannot be used.
    """

    num_clients: int
    dirichlet_alpha: float = 0.5
    min_examples: int = 10

    def __post_init__(self) -> None:
        check_at_least("partition.num_clients", self.num_clients, 1)
        check_positive("partition.dirichlet_alpha", self.dirichlet_alpha)
        check_at_least("partition.min_examples", self.min_examples, 1)

    def assign(
        self, labels: np.ndarray, num_classes: int, rng: np.random.Generator, columns: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Say who gets which examples.

        Args:
            labels: class of each training example, shape ``(n,)``.
            num_classes: number of classes.
            rng: where sizes and the order are drawn from.
            columns: not used.

        Returns:
            Sorted positions by client id.

        Raises:
            DataError: there are too few examples for the minimum.
        """
        check_enough(len(labels), self.num_clients, self.min_examples)
        shares = rng.dirichlet(np.full(self.num_clients, self.dirichlet_alpha))
        if not np.isfinite(shares).all() or shares.sum() <= 0:  # a vanishing concentration means: one takes all
            shares = np.eye(self.num_clients)[rng.integers(self.num_clients)]
        sizes = self.min_examples + share_out(len(labels) - self.num_clients * self.min_examples, shares)
        return named(np.split(rng.permutation(len(labels)), np.cumsum(sizes)[:-1]))
