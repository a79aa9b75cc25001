"""The pathological split: a few shards of one label each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedfuse.core.errors import DataError
from fedfuse.core.registry import register_partition
from fedfuse.data.checks import check_at_least
from fedfuse.data.partitions.assignment import named


@register_partition("shards")
@dataclass(frozen=True, kw_only=True)
class Shards:
    """Data sorted by label and cut into equal shards; each client gets a few at random (the pathological split).

    McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017.

    Args:
        num_clients: at least 1.
        num_shards_per_client: at least 1; about the number of classes that a client has.

    Raises:
        ConfigError: a value cannot be used.
    """

    num_clients: int
    num_shards_per_client: int = 2

    def __post_init__(self) -> None:
        check_at_least("partition.num_clients", self.num_clients, 1)
        check_at_least("partition.num_shards_per_client", self.num_shards_per_client, 1)

    def assign(
        self, labels: np.ndarray, num_classes: int, rng: np.random.Generator, columns: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Say who gets which examples.

        Args:
            labels: class of each training example, shape ``(n,)``.
            num_classes: number of classes.
            rng: where orders and shards are drawn from.
            columns: not used.

        Returns:
            Sorted positions by client id.

        Raises:
            DataError: there are fewer examples than shards.
        """
        num_shards = self.num_clients * self.num_shards_per_client
        if len(labels) < num_shards:
            raise DataError(
                f"{len(labels)} examples cannot be cut into {num_shards} shards",
                where="partition",
                fix="use fewer clients, fewer shards per client, or more data",
            )
        order = rng.permutation(len(labels))
        order = order[np.argsort(labels[order], kind="stable")]
        shards = np.array_split(order, num_shards)
        dealt = rng.permutation(num_shards).reshape(self.num_clients, self.num_shards_per_client)
        return named([np.concatenate([shards[shard] for shard in row]) for row in dealt])
