"""Local Parquet files in the layout of the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedfuse.core.errors import DataError
from fedfuse.core.registry import register_source
from fedfuse.data.arrow import ArrowSettings
from fedfuse.data.cache import files_digest
from fedfuse.data.checks import optional_module
from fedfuse.data.dataset import Dataset

_TRAIN_NAMES = ("train",)
_TEST_NAMES = ("test", "validation", "valid", "val")


@register_source("parquet")
@dataclass(frozen=True, kw_only=True)
class Parquet(ArrowSettings):
    """Parquet files: a folder with ``train-*.parquet`` and ``test-*.parquet``, or single files.

    The files may also lie in ``data/``, as on the Hugging Face hub; without a test part, the validation part is the
    test part. Images are decoded once; their pixels are kept in the cache folder. Without images, all columns of
    numbers are features.

    Args:
        path: the folder, or the file of the training part.
        test_path: the file or folder of the test part, where it is not found beside the training part.
        dataset_name: what to call the data; the last part of the path where not set.
    """

    path: str
    test_path: str | None = None
    dataset_name: str | None = None

    def load(self, limit: int | None = None, test_limit: int | None = None) -> Dataset:
        """Read the data.

        Args:
            limit: first training rows only; only these are decoded.
            test_limit: first test rows only.

        Returns:
            Images or a table.

        Raises:
            ConfigError: a column that was set is not there, or none can be found.
            DataError: there are no files, or their content cannot be used.
        """
        path = Path(self.path).expanduser()
        train_files, test_files = _find_files(path)
        if self.test_path is not None:
            test_files = _files_at(Path(self.test_path).expanduser())
        name = self.dataset_name or (path.stem if path.is_file() else path.resolve().name)
        test = ParquetPart(tuple(test_files)) if test_files else None
        return self.dataset(ParquetPart(tuple(train_files)), test, name, limit, test_limit)


@dataclass(frozen=True)
class ParquetPart:
    """Some Parquet files, one after the other.

    Args:
        files: in order; columns as in the first.
    """

    files: tuple[Path, ...]

    @property
    def where(self) -> str:
        """The first file."""
        return str(self.files[0])

    @property
    def names(self) -> list[str]:
        """All columns."""
        return list(self._schema.names)

    @cached_property
    def features(self) -> Mapping[str, Any]:
        """Hugging Face features by column, as JSON; empty where unknown."""
        try:
            features = json.loads((self._schema.metadata or {})[b"huggingface"])["info"]["features"]
        except (KeyError, ValueError, TypeError, RecursionError):
            return {}
        return features if isinstance(features, dict) else {}

    @cached_property
    def num_rows(self) -> int:
        """Number of rows."""
        return sum(self._open(file).metadata.num_rows for file in self.files)

    @cached_property
    def digest(self) -> str:
        """Names the content, for the cache."""
        return files_digest(self.files)

    def read(self, columns: list[str], limit: int | None) -> Any:
        """A pyarrow table of the first rows.

        Args:
            columns: which.
            limit: how many rows; ``None`` means all.

        Returns:
            The table.

        Raises:
            DataError: a file is damaged, or lacks a column of the first file.
        """
        pyarrow = optional_module("pyarrow", package="pyarrow", extra="data")
        batches: list[Any] = []
        missing = limit
        for file in self.files:
            if missing == 0:
                break
            opened = self._open(file)
            lacking = [name for name in columns if name not in opened.schema_arrow.names]
            if lacking:
                raise DataError(
                    f'there is no column "{lacking[0]}"',
                    where=str(file),
                    fix=f"give it the columns of {self.files[0].name}",
                )
            try:
                for batch in opened.iter_batches(batch_size=min(missing or 8192, 8192), columns=columns):
                    batches.append(batch if missing is None else batch.slice(0, missing))
                    if missing is not None:
                        missing = max(0, missing - len(batch))
                        if missing == 0:
                            break
            except (OSError, pyarrow.ArrowException) as error:
                raise DataError(
                    f"the file is damaged: {_first_line(error)}", where=str(file), fix="copy it again"
                ) from None
        schema = pyarrow.schema([self._schema.field(name) for name in columns])
        try:
            return (
                pyarrow.Table.from_batches([batch.select(columns) for batch in batches])
                if batches
                else schema.empty_table()
            )
        except pyarrow.ArrowException as error:
            raise DataError(
                f"the files have different columns: {_first_line(error)}",
                where=self.where,
                fix="write them with one schema",
            ) from None

    @cached_property
    def _schema(self) -> Any:
        return self._open(self.files[0]).schema_arrow

    def _open(self, file: Path) -> Any:
        pyarrow = optional_module("pyarrow", package="pyarrow", extra="data")
        parquet = optional_module("pyarrow.parquet", package="pyarrow", extra="data")
        try:
            return parquet.ParquetFile(file)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(
                f"this is no Parquet file: {_first_line(error)}", where=str(file), fix="name a Parquet file"
            ) from None


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _find_files(path: Path) -> tuple[list[Path], list[Path]]:
    """Files of the training part and of the test part; the latter may be none."""
    if path.is_file():
        return [path], []
    if not path.is_dir():
        raise DataError(
            "there is no such file or folder", where=str(path), fix="name a Parquet file, or a folder of them"
        )
    for folder in (path, path / "data"):
        train = _named(folder, _TRAIN_NAMES)
        if train:
            return train, next((found for name in _TEST_NAMES if (found := _named(folder, (name,)))), [])
    lone = sorted(path.glob("*.parquet"))
    if len(lone) == 1:
        return lone, []
    raise DataError(
        "the folder holds no training part",
        where=str(path),
        fix="call its files train-*.parquet and test-*.parquet, or name one file",
    )


def _named(folder: Path, prefixes: Sequence[str]) -> list[Path]:
    return sorted(
        file
        for file in folder.glob("*.parquet")
        if any(
            file.stem == prefix or file.name.startswith((f"{prefix}-", f"{prefix}_", f"{prefix}."))
            for prefix in prefixes
        )
    )


def _files_at(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(path.glob("*.parquet")) if path.is_dir() else []
    if not files:
        raise DataError(
            "there is no Parquet file for the test part",
            where=str(path),
            fix="set test_path to a Parquet file, or a folder of them",
        )
    return files
