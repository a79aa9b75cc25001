"""Arrow tables with Hugging Face features to data sets; shared by the sources that read them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.examples import Examples
from fedfuse.data.checks import check_fraction, check_limit, optional_module
from fedfuse.data.dataset import Dataset
from fedfuse.data.images import ImageItem, cached_images, check_image_settings, to_unit_range
from fedfuse.data.labels import encode_labels
from fedfuse.data.tables import LABEL_NAMES, check_columns, find_label, table_features

IMAGE_NAMES = ("image", "img", "picture", "photo")
"""Names under which a column of encoded images is found where the features do not tell it."""


class ArrowPart(Protocol):
    """The training part or the test part, not yet read."""

    @property
    def names(self) -> list[str]:
        """All columns."""
        ...

    @property
    def features(self) -> Mapping[str, Any]:
        """Hugging Face features by column, as JSON; empty where unknown."""
        ...

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        ...

    @property
    def digest(self) -> str:
        """Names the content, for the cache."""
        ...

    @property
    def where(self) -> str:
        """What error messages call it."""
        ...

    def read(self, columns: list[str], limit: int | None) -> Any:
        """A pyarrow table of the first rows.

        Args:
            columns: which.
            limit: how many rows; ``None`` means all.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ArrowSettings:
    """Settings that sources of Arrow tables share.

    Args:
        image_column: column of encoded images; found where not set.
        label_column: column of labels; found where not set.
        ignore_columns: columns that are no features; they can still make natural clients.
        size: side to resize images to, in pixels; not set keeps their own.
        channels: 1 for grey, 3 for colour; not set takes 3 if any image is in colour.
        test_fraction: share of the training part that becomes the test part where there is none, in [0, 1).

    Raises:
        ConfigError: a value cannot be used.
    """

    image_column: str | None = None
    label_column: str | None = None
    ignore_columns: tuple[str, ...] = ()
    size: int | None = None
    channels: int | None = None
    test_fraction: float = 0.0

    def __post_init__(self) -> None:
        check_image_settings(self.size, self.channels)
        check_fraction("source.test_fraction", self.test_fraction)

    def dataset(
        self, train: ArrowPart, test: ArrowPart | None, name: str, limit: int | None, test_limit: int | None
    ) -> Dataset:
        """Read both parts.

        Args:
            train: training part.
            test: test part; ``None`` splits one off or warns.
            name: what to call the data.
            limit: first training rows only.
            test_limit: first test rows only.

        Raises:
            ConfigError: a column that was set is not there, or none can be found.
            DataError: the content cannot be used.
        """
        check_limit("limit", limit)
        check_limit("test_limit", test_limit)
        if test is None and self.test_fraction:
            # The split must see all rows, or it would change with the limit.
            return (
                self._read(train, None, name, None, None).with_test_part(self.test_fraction).limited(limit, test_limit)
            )
        return self._read(train, test, name, limit, test_limit).with_test_part(0.0)

    def _read(
        self, train: ArrowPart, test: ArrowPart | None, name: str, limit: int | None, test_limit: int | None
    ) -> Dataset:
        check_columns(self.ignore_columns, train.names, "ignore_columns", where=train.where)
        image = self._find_image(train)
        label = self._find_label(train)
        parts = [(train, limit), (test, test_limit)] if test is not None else [(train, limit)]
        used = [label] if image is None else [image, label]
        for part, _ in parts:
            if part is not None:
                check_columns(used, part.names, "columns", where=part.where)
        # Classes are numbered over all rows, so that they do not change with a limit.
        labels = [column_values(part.read([label], None), label, part.where) for part, _ in parts if part is not None]
        y, y_test, class_names = encode_labels(
            labels[0], labels[1] if test is not None else None, class_names_of(train.features.get(label)), where=name
        )
        others = [column for column in train.names if column not in used]
        columns: dict[str, np.ndarray] = {}
        if image is not None:
            x = self._images(train, image, limit)
            x_test = None if test is None else self._images(test, image, test_limit)
            if x_test is not None and x_test.shape[1] != x.shape[1]:
                raise DataError(
                    f"training images have {x.shape[1]} channels and test images {x_test.shape[1]}",
                    where=name,
                    fix="set channels to 1 or 3",
                )
            x, x_test = to_unit_range(x), None if x_test is None else to_unit_range(x_test)
            kept = [column for column in others if is_scalar(train, column)]
        else:
            features = [column for column in others if column not in self.ignore_columns]
            tables = [
                {c: column_values(t, c, part.where) for c in features}
                for part, n in parts
                if part is not None
                for t in [part.read(features, n)]
            ]
            x, x_test = table_features(
                tables[0], tables[1] if test is not None else None, features, max_categories=0, where=name
            )
            kept = others
        if kept:
            table = train.read(kept, limit)
            columns = {column: column_facts(table, column) for column in kept}
        return Dataset(
            train=Examples(x, y[:limit]),
            test=None if x_test is None or y_test is None else Examples(x_test, y_test[:test_limit]),
            class_names=class_names,
            columns=columns,
            is_image=image is not None,
            name=name,
        )

    def _find_image(self, part: ArrowPart) -> str | None:
        if self.image_column is not None:
            check_columns([self.image_column], part.names, "image_column", where=part.where)
            return self.image_column
        typed = [name for name in part.names if _type(part.features.get(name)) == "Image"]
        if len(typed) > 1:
            raise ConfigError(
                f"there are several columns of images: {', '.join(typed)}",
                where=part.where,
                fix="set image_column to one of them",
            )
        if typed:
            return typed[0]
        schema = part.read(part.names, 0).schema
        named = [name for name in IMAGE_NAMES if name in part.names and _holds_bytes(schema.field(name).type)]
        return named[0] if named else None

    def _find_label(self, part: ArrowPart) -> str:
        if self.label_column is None and not any(name in part.names for name in LABEL_NAMES):
            typed = [name for name in part.names if _type(part.features.get(name)) == "ClassLabel"]
            if len(typed) == 1:
                return typed[0]
            texts = [
                name
                for name in part.names
                if str(part.read([name], 0).schema.field(name).type) in ("string", "large_string")
            ]
            if texts and not typed:
                raise DataError(
                    f"there is no label column, and {', '.join(texts)} hold texts",
                    where=part.where,
                    fix="this source reads images and numbers",
                )
        return find_label(part.names, self.label_column, where=part.where)

    def _images(self, part: ArrowPart, column: str, limit: int | None) -> Any:
        def read(count: int | None) -> Sequence[ImageItem]:
            values = part.read([column], count).column(column).to_pylist()
            return [_image_item(value, row, column, part.where) for row, value in enumerate(values)]

        digest = hashlib.sha256(json.dumps([part.digest, column]).encode()).hexdigest()
        return cached_images(
            digest,
            read,
            num_images=part.num_rows,
            limit=limit,
            size=self.size,
            channels=self.channels,
            where=part.where,
        )


def _type(feature: Any) -> str:
    return str(feature.get("_type", "")) if isinstance(feature, Mapping) else ""


def class_names_of(feature: Any) -> tuple[str, ...]:
    """Names of the classes of a column of labels.

    Args:
        feature: the column's Hugging Face feature, as JSON; ``None`` where unknown.

    Returns:
        In label order; empty where it names none.
    """
    names = feature.get("names") if _type(feature) == "ClassLabel" else None
    return tuple(str(name) for name in names) if isinstance(names, (list, tuple)) else ()


def _holds_bytes(kind: Any) -> bool:
    return str(kind) in ("binary", "large_binary") or (str(kind).startswith("struct<") and "bytes: binary" in str(kind))


def is_scalar(part: ArrowPart, column: str) -> bool:
    """Whether a column holds one number or text per row.

    Args:
        part: where it is.
        column: its name.
    """
    types = optional_module("pyarrow.types", package="pyarrow", extra="data")
    kind = part.read([column], 0).schema.field(column).type
    return bool(
        types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_boolean(kind)
        or types.is_string(kind)
        or types.is_large_string(kind)
    )


def _image_item(value: Any, row: int, column: str, where: str) -> ImageItem:
    if isinstance(value, bytes):
        return value
    if isinstance(value, Mapping):
        if isinstance(value.get("bytes"), bytes):
            return value["bytes"]  # type: ignore[no-any-return]
        if isinstance(value.get("path"), str):
            return Path(value["path"])
    raise DataError(
        f'the column "{column}" has no image in row {row}',
        where=where,
        fix="name a column of encoded images, or take the row out",
    )


def column_values(table: Any, name: str, where: str) -> np.ndarray:
    """A column as numbers, texts, or numbers of shape ``(n, width)``.

    Args:
        table: a pyarrow table.
        name: of the column.
        where: what error messages call the data.

    Returns:
        One entry per row.

    Raises:
        DataError: there is a gap, or it holds something else.
    """
    types = optional_module("pyarrow.types", package="pyarrow", extra="data")
    column = table.column(name)
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.null_count:
        row = next(i for i, value in enumerate(column) if not value.is_valid)
        raise DataError(
            f'the column "{name}" has no value in row {row}',
            where=where,
            fix="fill missing values in, or take the row out",
        )
    if types.is_string(column.type) or types.is_large_string(column.type):
        return np.array(column.to_pylist(), dtype=str)
    if types.is_list(column.type) or types.is_large_list(column.type) or types.is_fixed_size_list(column.type):
        rows = column.to_pylist()
        try:
            return np.array(rows, dtype=np.float64)
        except (ValueError, TypeError):
            raise DataError(
                f'the column "{name}" holds lists that are not equally long lists of numbers', where=where
            ) from None
    if types.is_integer(column.type) or types.is_floating(column.type) or types.is_boolean(column.type):
        return np.asarray(column.to_numpy())
    raise DataError(
        f'the column "{name}" holds values of type {column.type}',
        where=where,
        fix="this source reads images and numbers; put the column into ignore_columns",
    )


def column_facts(table: Any, name: str) -> np.ndarray:
    """A column that only names things.

    Args:
        table: a pyarrow table.
        name: of the column.

    Returns:
        Whole numbers or texts; a gap is the text "missing".
    """
    values = table.column(name).to_pylist()
    if values and all(isinstance(value, int) for value in values):
        return np.array(values, dtype=np.int64)
    return np.array(["missing" if value is None else str(value) for value in values], dtype=str)
