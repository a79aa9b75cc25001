"""Label skew: each class is split over the clients by a Dirichlet draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedfuse.core.errors import DataError
from fedfuse.core.registry import register_partition
from fedfuse.data.checks import check_at_least, check_positive
from fedfuse.data.partitions.assignment import check_enough, named


@register_partition("dirichlet")
@dataclass(frozen=True, kw_only=True)
class Dirichlet:
    """Each class is split by shares drawn from a Dirichlet distribution; the usual label skew.

    Shares are drawn anew until every client has its minimum. The balanced rule is the one of the published code of
    DENSE, FuseFL and others, which their papers seldom mention: class after class, a client that already has its fair
    share of all examples, N / K, gets no more.

    Args:
        num_clients: K, at least 1.
        dirichlet_alpha: concentration, above 0; small is skewed: 0.1 gives few classes per client, 100 nearly equal
            parts.
        min_examples: fewest examples of a client, at least 1.
        balanced: use the balanced rule; without it, sizes are skewed too.
        max_draws: after so many draws without success it ends with an error, at least 1.

    Raises:
        ConfigError: a value cannot be used.
    """

    num_clients: int
    dirichlet_alpha: float = 0.5
    min_examples: int = 10
    balanced: bool = True
    max_draws: int = 1000

    def __post_init__(self) -> None:
        check_at_least("partition.num_clients", self.num_clients, 1)
        check_positive("partition.dirichlet_alpha", self.dirichlet_alpha)
        check_at_least("partition.min_examples", self.min_examples, 1)
        check_at_least("partition.max_draws", self.max_draws, 1)

    def assign(
        self, labels: np.ndarray, num_classes: int, rng: np.random.Generator, columns: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Say who gets which examples.

        Args:
            labels: class of each training example, in [0, num_classes), shape ``(n,)``.
            num_classes: number of classes.
            rng: where shares and orders are drawn from.
            columns: not used.

        Returns:
            Sorted positions by client id.

        Raises:
            DataError: there are too few examples, or no draw gave every client its minimum.
        """
        check_enough(len(labels), self.num_clients, self.min_examples)
        class_sizes = np.bincount(labels, minlength=num_classes)
        # Only counts are drawn anew, not the order of all examples: a thousand draws cost well under a second.
        for _ in range(self.max_draws):
            counts = dirichlet_counts(class_sizes, self.num_clients, self.dirichlet_alpha, rng, balanced=self.balanced)
            if counts.sum(axis=1).min() >= self.min_examples:
                break
        else:
            raise DataError(
                f"{self.max_draws} draws gave no partition in which each of {self.num_clients} clients has "
                f"{self.min_examples} examples",
                where="partition",
                fix="raise dirichlet_alpha, lower min_examples, use fewer clients, or more data",
            )
        pieces: list[list[np.ndarray]] = [[] for _ in range(self.num_clients)]
        for c in range(num_classes):
            members = rng.permutation(np.flatnonzero(labels == c))
            for client, piece in enumerate(np.split(members, np.cumsum(counts[:, c])[:-1])):
                pieces[client].append(piece)
        return named([np.concatenate(piece) for piece in pieces])


def dirichlet_counts(
    class_sizes: np.ndarray, num_clients: int, dirichlet_alpha: float, rng: np.random.Generator, *, balanced: bool
) -> np.ndarray:
    """How many examples of each class each client gets, by one draw per class.

    Args:
        class_sizes: examples of each class, shape ``(num_classes,)``.
        num_clients: at least 1.
        dirichlet_alpha: concentration, above 0.
        rng: where shares are drawn from.
        balanced: a client that has its fair share of all examples gets no more.

    Returns:
        int64, shape ``(num_clients, num_classes)``; columns sum to ``class_sizes``.
    """
    counts = np.zeros((num_clients, len(class_sizes)), dtype=np.int64)
    fair_share = class_sizes.sum() / num_clients
    for c, size in enumerate(class_sizes.tolist()):
        shares = rng.dirichlet(np.full(num_clients, dirichlet_alpha))
        if balanced:
            has_room = counts.sum(axis=1) < fair_share
            # A tiny concentration can give everything to clients that are full; then those with room share alike.
            shares = np.where(has_room, shares, 0.0)
            if shares.sum() <= 0:
                shares = has_room.astype(np.float64) if has_room.any() else np.ones(num_clients)
        if not np.isfinite(shares).all() or shares.sum() <= 0:
            shares = np.eye(num_clients)[rng.integers(num_clients)]
        cuts = np.minimum((np.cumsum(shares / shares.sum()) * size).astype(np.int64)[:-1], size)
        counts[:, c] = np.diff(np.concatenate([[0], cuts, [size]]))
    return counts
