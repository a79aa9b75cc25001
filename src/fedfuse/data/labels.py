"""Labels of any kind to 0 .. num_classes - 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError, DataError, did_you_mean

LabelSetting = Mapping[str, str | Mapping[str, str]]
"""Own class name to common class name; under a client's id, a table of that client's own."""


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


@dataclass(frozen=True)
class LabelTables:
    """How clients' own names of classes become the common ones.

    Args:
        common: own name to common name, at every client and in the test part.
        own: client id to a table that holds for that client only, and wins there.
    """

    common: Mapping[str, str] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, setting: LabelSetting | None) -> LabelTables:
        """Read the setting ``labels``.

        Args:
            setting: class names to class names, and client ids to such tables; numbers count as their digits.

        Raises:
            ConfigError: it is no such table.
        """
        common: dict[str, str] = {}
        own: dict[str, dict[str, str]] = {}
        if setting is not None and not isinstance(setting, Mapping):
            raise ConfigError("labels is no table", where="data.labels", fix="write labels: {own name: common name}")
        for key, value in (setting or {}).items():
            if isinstance(value, Mapping):
                own[str(key)] = {str(name): str(target) for name, target in value.items()}
            elif isinstance(value, (str, int)):
                common[str(key)] = str(value)
            else:
                raise ConfigError(
                    f"the class {key} is mapped to a {type(value).__name__}",
                    where=f"data.labels.{key}",
                    fix="give the common name of the class, or under a client's id a table of such names",
                )
        return cls(common, own)

    def check_clients(self, client_ids: Sequence[str]) -> None:
        """Refuse a table for a client that there is not.

        Args:
            client_ids: all clients.

        Raises:
            ConfigError: there is one.
        """
        for client_id in self.own:
            if client_id not in client_ids:
                fix = did_you_mean(client_id, client_ids)
                raise ConfigError(f'there is no client "{client_id}"', where=f"data.labels.{client_id}", fix=fix)

    def table(self, client_id: str) -> dict[str, str]:
        """Own name to common name at one client.

        Args:
            client_id: the client; any other text gives what all have in common.
        """
        return {**self.common, **self.own.get(client_id, {})}

    def class_names(self, names: Sequence[str], used: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
        """The common list of classes, when clients' labels are numbers of a data set's own names.

        Args:
            names: the data set's own names, in label order.
            used: client id (or ``test``) to the labels that it has.

        Returns:
            The data set's names after mapping, in their order, then further ones; a name that is mapped everywhere
            it occurs is left out.

        Raises:
            ConfigError: a table names a class that the data set does not have.
        """
        for where, table in (("data.labels", self.common), *((f"data.labels.{c}", t) for c, t in self.own.items())):
            for name in table:
                if name not in names:
                    raise ConfigError(
                        f'there is no class "{name}"', where=f"{where}.{name}", fix=did_you_mean(name, names)
                    )
        kept = {names[y] for part, ys in used.items() for y in ys if names[y] not in self.table(part)}
        mapped = set(self.common).union(*self.own.values())
        found: dict[str, None] = {}
        for name in names:
            if name in self.common:
                found[self.common[name]] = None
            elif name in kept or name not in mapped:
                found[name] = None
        for table in (self.common, *self.own.values()):
            found.update(dict.fromkeys(table.values()))
        return tuple(found)

    def numbers(self, client_id: str, names: Sequence[str], class_names: Sequence[str]) -> Tensor:
        """The common number of each of the data set's own classes, at one client.

        Args:
            client_id: the client, or ``test``.
            names: the data set's own names, in label order.
            class_names: the common list.

        Returns:
            int64, shape ``(len(names),)``; -1 for a class that this client cannot have.
        """
        table, position = self.table(client_id), {name: i for i, name in enumerate(class_names)}
        return torch.tensor([position.get(table.get(name, name), -1) for name in names])


@dataclass(frozen=True)
class Numbering:
    """Turns one client's labels, whole numbers or texts, into numbers of the common classes.

    Args:
        class_names: the common list.
        table: own name to common name; a number counts as its digits.
    """

    class_names: Sequence[str]
    table: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for own, name in self.table.items():
            if name not in self.class_names:
                raise ConfigError(
                    f'"{own}" is mapped to "{name}", which is none of the classes',
                    where=f"labels.{own}",
                    fix=did_you_mean(name, self.class_names),
                )

    def __call__(self, label: Any) -> int:
        """The number of a label; a number that the table does not name is a position in the common list.

        Args:
            label: as the client has it.

        Raises:
            DataError: it is none of the classes.
        """
        if isinstance(label, (bool, np.generic)):
            label = int(label) if isinstance(label, bool) else label.item()
        if isinstance(label, float) and label.is_integer():
            label = int(label)
        name = self.table.get(str(label), label)
        if isinstance(name, int) and 0 <= name < len(self.class_names):
            return name
        if name in self.class_names:
            return list(self.class_names).index(str(name))
        known = ", ".join(self.class_names[:10]) + (", ..." if len(self.class_names) > 10 else "")
        raise DataError(
            f'the label "{label}" is none of the {len(self.class_names)} classes: {known}',
            fix="name its class in labels={own name: common name}, or add it to class_names",
        )


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
