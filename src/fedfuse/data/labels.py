"""Labels of any kind to 0 .. num_classes - 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedfuse.core.errors import DataError


def encode_labels(
    train: np.ndarray, test: np.ndarray | None, class_names: Sequence[str] | None = None, *, where: str
) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
    """Number the classes in sorted order.

    Args:
        train: labels as they were read: whole numbers, truth values or texts, shape ``(n,)``.
        test: labels of the test part; classes that only it has are counted too.
        class_names: names of the classes 0 .. C - 1 where the data brings them; labels must then be such numbers.
        where: what error messages call the data.

    Returns:
        Training labels and test labels as int64, and the name of each class.

    Raises:
        DataError: a label is missing or is no class.

    Example:
        >>> y, _, names = encode_labels(np.array(["dog", "cat", "dog"]), None, where="pets")
        >>> y.tolist(), names
        ([1, 0, 1], ('cat', 'dog'))
    """
    parts = [_clean(part, where) for part in (train, test) if part is not None]
    if class_names:
        for part in parts:
            _check_named(part, len(class_names), where)
        names = tuple(class_names)
        numbers = [part.astype(np.int64) for part in parts]
    else:
        if len({part.dtype.kind for part in parts}) > 1:
            parts = [part.astype(str) for part in parts]
        classes = np.unique(np.concatenate(parts))
        names = tuple(str(value) for value in classes.tolist())
        numbers = [np.searchsorted(classes, part).astype(np.int64) for part in parts]
    tensors = [torch.from_numpy(part) for part in numbers]
    return tensors[0], tensors[1] if test is not None else None, names


def _check_named(labels: np.ndarray, num_classes: int, where: str) -> None:
    if labels.dtype.kind != "i":
        raise DataError(f"the labels are texts, but the data names {num_classes} classes for numbers", where=where)
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"row {row} has the label {labels[row]}, but there are {num_classes} classes",
            where=where,
            fix="-1 often means that the labels of a test part are not public: choose another part"
            if labels[row] == -1
            else "check the label column",
        )


def _clean(labels: np.ndarray, where: str) -> np.ndarray:
    """Labels as int64 or as texts, without gaps."""
    if labels.ndim != 1:
        raise DataError(
            f"the labels have shape {labels.shape}",
            where=where,
            fix="give one class per example: shape (num_examples,)",
        )
    if labels.dtype.kind in "iub":
        return labels.astype(np.int64)
    if labels.dtype.kind == "f":
        wrong = np.flatnonzero(~np.isfinite(labels) | (labels != np.floor(labels)))
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"the labels are not classes: row {row} holds {labels[row]}",
                where=where,
                fix="labels are whole numbers or texts",
            )
        return labels.astype(np.int64)
    values = labels.tolist()
    for row, value in enumerate(values):
        if value is None or value == "":
            raise DataError(f"row {row} has no label", where=where, fix="fill the label in, or take the row out")
    if all(isinstance(value, (bool, int, np.integer)) for value in values):
        return np.array(values, dtype=np.int64)
    if not all(isinstance(value, str) for value in values):
        odd = next(value for value in values if not isinstance(value, str))
        raise DataError(
            f"the labels are not classes: one is a {type(odd).__name__}",
            where=where,
            fix="labels are whole numbers or texts",
        )
    return np.array(values, dtype=str)
