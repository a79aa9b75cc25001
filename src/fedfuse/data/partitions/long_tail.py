"""Classes whose sizes decay, then split over the clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedfuse.core.registry import register_partition
from fedfuse.data.checks import check_at_least, check_positive
from fedfuse.data.partitions.assignment import Partition
from fedfuse.data.partitions.dirichlet import Dirichlet
from fedfuse.data.partitions.iid import Iid


@register_partition("long_tail")
@dataclass(frozen=True, kw_only=True)
class LongTail:
    """Class sizes decay exponentially, and what is kept is split over the clients.

    Class c keeps n_max * imbalance_factor ** (-c / (C - 1)) examples, where n_max is the size of the largest class; at
    least one, and at most what it has. The clients together have the kept examples, not all of the data.

    Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS 2019.

    Args:
        num_clients: at least 1.
        imbalance_factor: size of the first class over size of the last, at least 1; 1 keeps balanced data whole.
        split: how the kept examples are split, ``iid`` or ``dirichlet``.
        dirichlet_alpha: concentration of the split ``dirichlet``, above 0.
        min_examples: fewest examples of a client with the split ``dirichlet``, at least 1.

    Raises:
        ConfigError: a value cannot be used.
    """

    num_clients: int
    imbalance_factor: float = 100.0
    split: Literal["iid", "dirichlet"] = "iid"
    dirichlet_alpha: float = 0.5
    min_examples: int = 10

    def __post_init__(self) -> None:
        check_at_least("partition.num_clients", self.num_clients, 1)
        check_at_least("partition.imbalance_factor", self.imbalance_factor, 1)
        check_positive("partition.dirichlet_alpha", self.dirichlet_alpha)
        check_at_least("partition.min_examples", self.min_examples, 1)

    def assign(
        self, labels: np.ndarray, num_classes: int, rng: np.random.Generator, columns: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Say who gets which examples.

        Args:
            labels: class of each training example, in [0, num_classes), shape ``(n,)``.
            num_classes: number of classes.
            rng: where kept examples and the split are drawn from.
            columns: not used.

        Returns:
            Sorted positions by client id.

        Raises:
            DataError: the kept examples cannot be split so.
        """
        sizes = long_tail_sizes(np.bincount(labels, minlength=num_classes), self.imbalance_factor)
        kept = np.sort(
            np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:size] for c, size in enumerate(sizes)])
        )
        inner = self._inner().assign(labels[kept], num_classes, rng, {})
        return {client_id: kept[positions] for client_id, positions in inner.items()}

    def _inner(self) -> Partition:
        if self.split == "iid":
            return Iid(num_clients=self.num_clients)
        return Dirichlet(
            num_clients=self.num_clients, dirichlet_alpha=self.dirichlet_alpha, min_examples=self.min_examples
        )


def long_tail_sizes(class_sizes: np.ndarray, imbalance_factor: float) -> np.ndarray:
    """How many examples of each class are kept.

    Args:
        class_sizes: examples of each class, shape ``(num_classes,)``.
        imbalance_factor: size of the first class over size of the last, at least 1.

    Returns:
        int64, shape ``(num_classes,)``.

    Example:
        >>> long_tail_sizes(np.array([100, 100, 100]), 100.0).tolist()
        [100, 10, 1]
    """
    num_classes = len(class_sizes)
    exponents = -np.arange(num_classes) / max(1, num_classes - 1)
    # The small term undoes rounding: 100 * 100 ** -1 can come out just below 1.
    wanted = np.floor(class_sizes.max() * imbalance_factor**exponents + 1e-9).astype(np.int64)
    kept: np.ndarray = np.minimum(np.maximum(wanted, 1), class_sizes)
    return kept
