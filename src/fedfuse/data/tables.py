"""Columns of a table to features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError, DataError, did_you_mean

LABEL_NAMES = ("label", "labels", "fine_label", "target", "targets", "class", "y")
"""Names under which a label column is found, in this order."""


def find_label(names: Sequence[str], label_column: str | None, *, where: str) -> str:
    """The column that holds the labels.

    Args:
        names: all columns.
        label_column: as set; ``None`` takes the first of the usual names.
        where: what error messages call the data.

    Returns:
        Its name.

    Raises:
        ConfigError: there is no such column.
    """
    if label_column is not None:
        check_columns([label_column], names, "label_column", where=where)
        return label_column
    found = [name for name in LABEL_NAMES if name in names]
    if not found:
        raise ConfigError(
            "no column is called label, target, class or y",
            where=where,
            fix=f"set label_column to one of: {', '.join(names)}",
        )
    return found[0]


def check_columns(wanted: Sequence[str], names: Sequence[str], setting: str, *, where: str) -> None:
    """Refuse names of columns that are not there.

    Args:
        wanted: as set.
        names: all columns.
        setting: where they were set, such as ``label_column``.
        where: what error messages call the data.

    Raises:
        ConfigError: one is not there; the message names the nearest.
    """
    for name in wanted:
        if name not in names:
            raise ConfigError(f'{setting}: there is no column "{name}"', where=where, fix=did_you_mean(name, names))


def table_features(
    train: Mapping[str, np.ndarray],
    test: Mapping[str, np.ndarray] | None,
    names: Sequence[str],
    *,
    max_categories: int,
    where: str,
) -> tuple[Tensor, Tensor | None]:
    """Numbers as they are, categories one-hot in sorted order, columns side by side.

    Args:
        train: column name to values, shape ``(n,)`` or ``(n, width)``.
        test: the same columns; a category that training does not have becomes zeros.
        names: the columns to use, in order.
        max_categories: most categories that a column of texts may have; 0 refuses texts.
        where: what error messages call the data.

    Returns:
        Features of both parts, float32, shape ``(n, num_features)``.

    Raises:
        DataError: there is no feature, a value is missing, or a column holds texts.
    """
    for name in names:
        _check_values(name, train[name], max_categories, where)
        if (
            test is not None
            and test[name].dtype.kind != train[name].dtype.kind
            and "U" in (test[name].dtype.kind, train[name].dtype.kind)
        ):
            raise DataError(
                f'the column "{name}" holds numbers in one part and texts in the other',
                where=where,
                fix="make them alike",
            )
    if not names:
        raise DataError(
            "there is no column of numbers to learn from", where=where, fix="this source reads images and numbers"
        )
    parts = [_stack(part, train, names, where) for part in (train, test) if part is not None]
    return parts[0], parts[1] if test is not None else None


def _check_values(name: str, column: np.ndarray, max_categories: int, where: str) -> None:
    if column.dtype.kind in "iufb":
        return
    if column.dtype.kind != "U":
        raise DataError(
            f'the column "{name}" holds neither numbers nor texts',
            where=where,
            fix="this source reads images and numbers",
        )
    num_values = len(np.unique(column))
    if num_values > max_categories:
        fix = "this source reads images and numbers; put the column into ignore_columns to leave it out"
        count = f" ({num_values} different ones, more than max_categories={max_categories})" if max_categories else ""
        raise DataError(f'the column "{name}" holds texts{count}', where=where, fix=fix)


def _stack(part: Mapping[str, np.ndarray], train: Mapping[str, np.ndarray], names: Sequence[str], where: str) -> Tensor:
    columns = []
    for name in names:
        column = part[name]
        if column.dtype.kind == "U":
            columns.append((column[:, None] == np.unique(train[name])[None, :]).astype(np.float32))
            continue
        numbers = column.astype(np.float32).reshape(len(column), -1)
        wrong = np.flatnonzero(~np.isfinite(numbers).all(axis=1))
        if len(wrong):
            raise DataError(
                f'the column "{name}" has no finite number in row {int(wrong[0])}',
                where=where,
                fix="fill missing values in, or take the row out",
            )
        columns.append(numbers)
    return torch.from_numpy(np.concatenate(columns, axis=1))
