"""What a partition is, and the check that every partition's result must pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from torch import Tensor

from fedfuse.core.errors import DataError
from fedfuse.data.dataset import Dataset

Embed: TypeAlias = Callable[[Dataset], Tensor]
"""Makes a vector of every training example by a model, shape ``(n, d)``."""


class Partition(Protocol):
    """A way to split training examples over clients: a frozen dataclass of settings with one method."""

    def assign(
        self, labels: np.ndarray, num_classes: int, rng: np.random.Generator, columns: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Say who gets which examples.

        Args:
            labels: class of each training example, in [0, num_classes), shape ``(n,)``.
            num_classes: number of classes.
            rng: where all random choices are drawn from.
            columns: further facts about each example, shape ``(n,)`` each.
        """
        ...


@runtime_checkable
class SeesInputs(Protocol):
    """A partition that goes by what the inputs hold, not by labels and columns alone."""

    def columns_of(self, dataset: Dataset, embed: Embed | None = None) -> Mapping[str, np.ndarray]:
        """Further facts about each training example, for :meth:`Partition.assign`.

        Args:
            dataset: whose training examples; the same for every seed.
            embed: makes vectors by a model, where there is one.

        Returns:
            Columns by name, shape ``(n,)`` each.
        """
        ...


def client_ids(num_clients: int) -> list[str]:
    """Ids ``client_0``, ``client_1``, ..., with leading zeros so that sorted order is the order of numbers.

    Args:
        num_clients: at least 1.

    Example:
        >>> client_ids(11)[0], client_ids(11)[10]
        ('client_00', 'client_10')
    """
    width = len(str(num_clients - 1))
    return [f"client_{number:0{width}d}" for number in range(num_clients)]


def named(pieces: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Give the pieces of a split to ``client_0``, ``client_1``, ... in order.

    Args:
        pieces: positions of each client, in any order.

    Returns:
        Sorted positions by client id, int64.
    """
    return {name: np.sort(piece).astype(np.int64) for name, piece in zip(client_ids(len(pieces)), pieces, strict=True)}


def check_enough(num_examples: int, num_clients: int, min_examples: int) -> None:
    """Refuse a split that no draw can give.

    Args:
        num_examples: how many there are.
        num_clients: over how many clients.
        min_examples: what each must have.

    Raises:
        DataError: there are too few examples.
    """
    if num_examples < num_clients * min_examples:
        raise DataError(
            f"{num_examples} examples cannot give {num_clients} clients at least {min_examples} each",
            where="partition",
            fix=f"use at most {num_examples // min_examples} clients, a smaller minimum, or more data",
        )


def check_assignment(assignment: Mapping[str, np.ndarray], num_examples: int) -> dict[str, np.ndarray]:
    """Check what a partition returned, so that a faulty one of a third party ends in a clear error.

    Args:
        assignment: positions by client id.
        num_examples: how many training examples there are.

    Returns:
        The same, clients and positions in sorted order.

    Raises:
        DataError: there is no client, a client has nothing, or a position is shared or does not exist.
    """
    if not assignment:
        raise DataError("the partition made no clients", where="partition", fix="check its settings")
    owners: dict[int, str] = {}
    checked = {}
    for client_id in sorted(assignment):
        positions = np.sort(np.asarray(assignment[client_id]).astype(np.int64))
        if len(positions) == 0:
            raise DataError(
                f"the partition gave {client_id} no examples", where="partition", fix="use fewer clients or more data"
            )
        if positions[0] < 0 or positions[-1] >= num_examples:
            raise DataError(
                f"the partition gave {client_id} an example that does not exist",
                where="partition",
                fix="mend the partition",
            )
        checked[client_id] = positions
    everything = np.concatenate(list(checked.values()))
    if len(np.unique(everything)) < len(everything):
        for client_id, positions in checked.items():
            for position in positions.tolist():
                if position in owners:
                    raise DataError(
                        f"the partition gave example {position} to {owners[position]} and to {client_id}",
                        where="partition",
                        fix="mend the partition",
                    )
                owners[position] = client_id
    return checked
