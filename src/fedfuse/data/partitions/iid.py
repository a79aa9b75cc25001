"""Equal parts of well-mixed data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedfuse.core.registry import register_partition
from fedfuse.data.checks import check_at_least
from fedfuse.data.partitions.assignment import check_enough, named


@register_partition("iid")
@dataclass(frozen=True, kw_only=True)
class Iid:
    """Equal parts of the shuffled data; sizes differ by at most one.

    Args:
        num_clients: at least 1.
        stratify: also deal each class out evenly, so that class counts differ by at most one.

    Raises:
        ConfigError: a value cannot be used.
    """

    num_clients: int
    stratify: bool = False

    def __post_init__(self) -> None:
        check_at_least("partition.num_clients", self.num_clients, 1)

    def assign(
        self, labels: np.ndarray, num_classes: int, rng: np.random.Generator, columns: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Say who gets which examples.

        Args:
            labels: class of each training example, shape ``(n,)``.
            num_classes: number of classes.
            rng: where the order is drawn from.
            columns: not used.

        Returns:
            Sorted positions by client id.

        Raises:
            DataError: there are fewer examples than clients.
        """
        check_enough(len(labels), self.num_clients, 1)
        order = rng.permutation(len(labels))
        if self.stratify:
            order = order[np.argsort(labels[order], kind="stable")]
        return named([order[first :: self.num_clients] for first in range(self.num_clients)])
