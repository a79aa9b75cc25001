"""Tables in files of several kinds, opened as parts of a data set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedfuse.core.errors import DataError
from fedfuse.data.arrow import ArrowPart
from fedfuse.data.cache import files_digest
from fedfuse.data.checks import optional_module

KINDS: Mapping[str, str] = {".parquet": "Parquet", ".jsonl": "JSON Lines", ".json": "JSON Lines", ".csv": "CSV"}
"""How files end, and what they are called."""


_TRAIN_NAMES = ("train",)
_TEST_NAMES = ("test", "validation", "valid", "val")


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


@dataclass(frozen=True)
class TextTablePart:
    """Some CSV or JSON Lines files, one after the other, read whole.

    Args:
        files: in order; columns as in the first.
        texts: columns that hold texts, whatever they look like: a CSV file does not say that "4." is an answer.
    """

    files: tuple[Path, ...]
    texts: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The first file."""
        return str(self.files[0])

    @property
    def names(self) -> list[str]:
        """All columns."""
        return list(self._table.column_names)

    @property
    def features(self) -> Mapping[str, Any]:
        """Such files tell none."""
        return {}

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return int(self._table.num_rows)

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
        """
        return self._table.select(columns).slice(0, limit)

    @cached_property
    def _table(self) -> Any:
        pyarrow = optional_module("pyarrow", package="pyarrow", extra="data")
        tables = [_read(file, self.texts) for file in self.files]
        try:
            return pyarrow.concat_tables(tables)
        except pyarrow.ArrowException:
            raise DataError(
                "the files have different columns", where=self.where, fix="write them with one schema"
            ) from None


def file_parts(
    path: Path, test_path: Path | None = None, texts: tuple[str, ...] = ()
) -> tuple[ArrowPart, ArrowPart | None]:
    """Open the training part and the test part of files.

    Args:
        path: a file, or a folder with ``train-*`` and ``test-*`` of one kind, also in its folder ``data``.
        test_path: the file or folder of the test part, where it is not found beside the training part.
        texts: columns that hold texts, where the files do not say.

    Returns:
        Both; the test part is ``None`` where there is none.

    Raises:
        DataError: there are no such files, or they are of an unknown kind.
    """
    suffix = _suffix(path)
    train, test = find_files(path, suffix, KINDS[suffix])
    if test_path is None:
        return _part(train, suffix, texts), _part(test, suffix, texts) if test else None
    test_suffix = _suffix(test_path)
    test = files_at(test_path, test_suffix, KINDS[test_suffix])
    return _part(train, suffix, texts), _part(test, test_suffix, texts)


def find_files(path: Path, suffix: str = ".parquet", kind: str = "Parquet") -> tuple[list[Path], list[Path]]:
    """Find the files of a data set by their names.

    Args:
        path: one file, or a folder with ``train-*`` and ``test-*``, also in its folder ``data``.
        suffix: how the files end.
        kind: what error messages call such a file.

    Returns:
        Files of the training part and of the test part; the latter may be none.

    Raises:
        DataError: there are none.
    """
    if path.is_file():
        return [path], []
    if not path.is_dir():
        raise DataError(
            "there is no such file or folder", where=str(path), fix=f"name a {kind} file, or a folder of them"
        )
    for folder in (path, path / "data"):
        train = _named(folder, _TRAIN_NAMES, suffix)
        if train:
            return train, next((found for name in _TEST_NAMES if (found := _named(folder, (name,), suffix))), [])
    lone = sorted(path.glob(f"*{suffix}"))
    if len(lone) == 1:
        return lone, []
    raise DataError(
        "the folder holds no training part",
        where=str(path),
        fix=f"call its files train-*{suffix} and test-*{suffix}, or name one file",
    )


def files_at(path: Path, suffix: str = ".parquet", kind: str = "Parquet") -> list[Path]:
    """Find the files of a test part that lies elsewhere.

    Args:
        path: one file, or a folder of them.
        suffix: how the files end.
        kind: what error messages call such a file.

    Returns:
        The files, at least one.

    Raises:
        DataError: there are none.
    """
    if path.is_file():
        return [path]
    files = sorted(path.glob(f"*{suffix}")) if path.is_dir() else []
    if not files:
        raise DataError(
            f"there is no {kind} file for the test part",
            where=str(path),
            fix=f"set test_path to a {kind} file, or a folder of them",
        )
    return files


def _named(folder: Path, prefixes: Sequence[str], suffix: str) -> list[Path]:
    return sorted(
        file
        for file in folder.glob(f"*{suffix}")
        if any(
            file.stem == prefix or file.name.startswith((f"{prefix}-", f"{prefix}_", f"{prefix}."))
            for prefix in prefixes
        )
    )


def _suffix(path: Path) -> str:
    known = ", ".join(KINDS)
    if path.is_file():
        if path.suffix not in KINDS:
            raise DataError("the file is of no known kind", where=str(path), fix=f"name a file that ends in {known}")
        return path.suffix
    if not path.is_dir():
        raise DataError("there is no such file or folder", where=str(path), fix=f"name a file or a folder of: {known}")
    for suffix in KINDS:
        if any(file for folder in (path, path / "data") for file in folder.glob(f"*{suffix}")):
            return suffix
    raise DataError("the folder holds no table", where=str(path), fix=f"put files into it that end in {known}")


def _part(files: list[Path], suffix: str, texts: tuple[str, ...]) -> ArrowPart:
    return ParquetPart(tuple(files)) if suffix == ".parquet" else TextTablePart(tuple(files), texts)


def _read(file: Path, texts: tuple[str, ...]) -> Any:
    pyarrow = optional_module("pyarrow", package="pyarrow", extra="data")
    try:
        if file.suffix == ".csv":
            csv = optional_module("pyarrow.csv", package="pyarrow", extra="data")
            kinds = csv.ConvertOptions(column_types=dict.fromkeys(texts, pyarrow.string()))
            return csv.read_csv(file, parse_options=csv.ParseOptions(newlines_in_values=True), convert_options=kinds)
        lines = optional_module("pyarrow.json", package="pyarrow", extra="data")
        # A row must lie within one block, and texts can be long.
        size_bytes = min(max(file.stat().st_size, 1 << 20), 1 << 30)
        return lines.read_json(file, read_options=lines.ReadOptions(block_size=size_bytes, use_threads=False))
    except (OSError, pyarrow.ArrowException) as error:
        reason, kind = _first_line(error), KINDS[file.suffix]
        raise DataError(
            f"this is no {kind} file: {reason}",
            where=str(file),
            fix="give it one JSON object per line" if kind == "JSON Lines" else "save it as comma-separated values",
        ) from None


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
