"""Tables as text, one example per line."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.examples import Examples
from fedfuse.core.registry import register_source
from fedfuse.data.checks import check_at_least, check_fraction, check_limit
from fedfuse.data.dataset import Dataset
from fedfuse.data.labels import encode_labels
from fedfuse.data.tables import check_columns, find_label, table_features

_MISSING = frozenset({"", "nan", "na", "n/a", "null"})


@register_source("csv")
@dataclass(frozen=True, kw_only=True)
class Csv:
    """Tables as text: columns of numbers are features, columns of few different texts become one-hot.

    The first line names the columns. Categories are those of the training part; another one in the test part becomes
    zeros. Nothing is filled in: a missing value is an error.

    Args:
        path: the file of the training part.
        label_column: column of the labels; found where not set.
        test_path: the file of the test part.
        test_fraction: share of the training part that becomes the test part where there is none, in [0, 1).
        ignore_columns: columns that are no features; they can still make natural clients.
        separator: one character between values.
        max_categories: most categories that a column may have; more are taken for free text, which is an error.
        dataset_name: what to call the data; the file's name where not set.

    Raises:
        ConfigError: a value cannot be used.
    """

    path: str
    label_column: str | None = None
    test_path: str | None = None
    test_fraction: float = 0.0
    ignore_columns: tuple[str, ...] = ()
    separator: str = ","
    max_categories: int = 64
    dataset_name: str | None = None

    def __post_init__(self) -> None:
        check_fraction("source.test_fraction", self.test_fraction)
        check_at_least("source.max_categories", self.max_categories, 2)
        if len(self.separator) != 1:
            raise ConfigError(
                f"separator must be one character, not {self.separator!r}",
                where="source.separator",
                fix='"," or ";" or "\\t"',
            )

    def load(self, limit: int | None = None, test_limit: int | None = None) -> Dataset:
        """Read the data.

        Args:
            limit: first training rows only.
            test_limit: first test rows only.

        Returns:
            A table; ``columns`` holds all columns of the file but the labels.

        Raises:
            ConfigError: a column that was set is not there, or a limit is below 1.
            DataError: the file cannot be read, or a value is missing.
        """
        check_limit("limit", limit)
        check_limit("test_limit", test_limit)
        path = Path(self.path).expanduser()
        train = self._read(path)
        test = None if self.test_path is None else self._read(Path(self.test_path).expanduser())
        names = list(train)
        check_columns(self.ignore_columns, names, "ignore_columns", where=str(path))
        label = find_label(names, self.label_column, where=str(path))
        if test is not None:
            lacking = [name for name in names if name not in test and name not in self.ignore_columns]
            if lacking:
                raise DataError(
                    f'there is no column "{lacking[0]}"',
                    where=str(self.test_path),
                    fix=f"give it the columns of {path.name}",
                )
        features = [name for name in names if name != label and name not in self.ignore_columns]
        y, y_test, class_names = encode_labels(train[label], None if test is None else test[label], where=str(path))
        x, x_test = table_features(train, test, features, max_categories=self.max_categories, where=str(path))
        dataset = Dataset(
            train=Examples(x, y),
            test=None if x_test is None or y_test is None else Examples(x_test, y_test),
            class_names=class_names,
            columns={name: train[name] for name in names if name != label},
            name=self.dataset_name or path.stem,
        )
        return dataset.with_test_part(self.test_fraction).limited(limit, test_limit)

    def _read(self, path: Path) -> dict[str, np.ndarray]:
        """Columns by name; whole numbers as int64, other numbers as float64, all else as texts."""
        names, rows, lines = _rows(path, self.separator)
        columns = {name: [row[i].strip() for row in rows] for i, name in enumerate(names)}
        for name in self.ignore_columns:
            columns[name] = ["missing" if value.lower() in _MISSING else value for value in columns.get(name, [])]
        return {name: _typed(columns[name], name, lines, path) for name in names}


def _rows(path: Path, separator: str) -> tuple[list[str], list[list[str]], list[int]]:
    """Names of the columns, the rows, and the line that each row ends in."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=separator)
            names = [name.strip() for name in next(reader, [])]
            rows, lines = [], []
            for row in reader:
                if not row:
                    continue
                if len(row) != len(names):
                    raise DataError(
                        f"line {reader.line_num} has {len(row)} values for {len(names)} columns",
                        where=str(path),
                        fix="check the line, and the setting separator",
                    )
                rows.append(row)
                lines.append(reader.line_num)
    except FileNotFoundError:
        raise DataError("there is no such file", where=str(path), fix="name a file of comma-separated values") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"the file cannot be read: {error}", where=str(path), fix="save it as comma-separated values in UTF-8"
        ) from None
    if not rows:
        raise DataError("the file holds no rows", where=str(path), fix="give it a line of names and at least one row")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f'two columns are called "{twice}"', where=str(path), fix="rename one of them")
    return names, rows, lines


def _typed(values: list[str], name: str, lines: list[int], path: Path) -> np.ndarray:
    for value, line in zip(values, lines, strict=True):
        if value.lower() in _MISSING:
            said = f": {value}" if value else ""
            raise DataError(
                f'the column "{name}" has no value in line {line}{said}',
                where=str(path),
                fix="fill missing values in, or take the line out",
            )
    try:
        return np.array([int(value) for value in values], dtype=np.int64)
    except (ValueError, OverflowError):
        pass
    try:
        return np.array([float(value) for value in values], dtype=np.float64)
    except ValueError:
        return np.array(values, dtype=str)
