"""Natural clients: one per value of a column."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedfuse.core.errors import ConfigError, DataError, did_you_mean
from fedfuse.core.registry import register_partition
from fedfuse.data.checks import check_at_least

_MAX_ID_LENGTH = 64


@register_partition("column")
@dataclass(frozen=True, kw_only=True)
class Column:
    """One client per value of a column, such as a writer, a hospital or a sensor.

    Client ids are the values, with all but letters, digits, dots, dashes and underscores replaced. Values with too few
    examples are left out, and so are those beyond ``max_clients``: only then are not all examples used.

    Args:
        column: name of the column.
        min_examples: values with fewer examples are left out, at least 1.
        max_clients: keep those with the most examples; not set keeps all.

    Raises:
        ConfigError: a value cannot be used.
    """

    column: str
    min_examples: int = 1
    max_clients: int | None = None

    def __post_init__(self) -> None:
        check_at_least("partition.min_examples", self.min_examples, 1)
        if self.max_clients is not None:
            check_at_least("partition.max_clients", self.max_clients, 1)

    def assign(
        self, labels: np.ndarray, num_classes: int, rng: np.random.Generator, columns: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Say who gets which examples.

        Args:
            labels: class of each training example, shape ``(n,)``.
            num_classes: number of classes.
            rng: not used.
            columns: must have the column.

        Returns:
            Sorted positions by client id.

        Raises:
            ConfigError: there is no such column.
            DataError: no value has enough examples.
        """
        if self.column not in columns:
            raise ConfigError(
                f'the data has no column "{self.column}"',
                where="partition.column",
                fix=did_you_mean(self.column, columns),
            )
        values, owners, sizes = np.unique(columns[self.column], return_inverse=True, return_counts=True)
        largest_first = np.argsort(-sizes, kind="stable")
        kept = [int(value) for value in largest_first if sizes[value] >= self.min_examples][: self.max_clients]
        if not kept:
            raise DataError(
                f'no value of the column "{self.column}" has {self.min_examples} examples',
                where="partition",
                fix=f"set min_examples to {int(sizes.max())} or less",
            )
        ids = value_ids(values)
        return {
            ids[value]: np.flatnonzero(owners == value).astype(np.int64) for value in sorted(kept, key=lambda v: ids[v])
        }


def value_ids(values: np.ndarray) -> list[str]:
    """Names that are safe as names of files, one per value.

    Args:
        values: different values in sorted order, shape ``(n,)``; whole numbers from 0 on get leading zeros, so that
            sorted order is the order of numbers.

    Returns:
        Different names, also where capital letters do not count; a repeated one ends in ``_2``, ``_3``, ...

    Example:
        >>> value_ids(np.array(["St. Mary", "St/ Mary"]))
        ['St._Mary', 'St__Mary']
        >>> value_ids(np.array([7, 12]))
        ['07', '12']
    """
    texts = [str(value) for value in values.tolist()]
    if values.dtype.kind in "iu" and len(values) and values.min() >= 0:
        width = len(str(values.max()))
        texts = [text.zfill(width) for text in texts]
    taken: set[str] = set()
    ids = []
    for text in texts:
        plain = re.sub(r"[^A-Za-z0-9._-]", "_", text)[:_MAX_ID_LENGTH].strip(".") or "empty"
        name, number = plain, 1
        while name.casefold() in taken:
            number += 1
            name = f"{plain}_{number}"
        taken.add(name.casefold())
        ids.append(name)
    return ids
