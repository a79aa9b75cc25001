"""Folders of image files with classes or with a table of facts, opened as parts of a data set."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedfuse.core.errors import DataError
from fedfuse.data.cache import files_digest
from fedfuse.data.checks import optional_module
from fedfuse.data.images import IMAGE_SUFFIXES

IMAGE = "image"
"""The column of pictures."""

LABEL = "label"
"""The column of classes, where each class has a folder."""

FILE_NAME = "file_name"
"""The column of a table of facts that names the picture's file."""

_TABLES = ("metadata.jsonl", "metadata.csv")
_TEST_NAMES = ("test", "validation", "valid", "val")


@dataclass(frozen=True)
class PictureFolder:
    """Image files of one part, in order, with what is known of each.

    Args:
        folder: where they are.
        files: the pictures.
        facts: column to one value per picture.
    """

    folder: Path
    files: tuple[Path, ...]
    facts: Mapping[str, list[Any]]

    @property
    def where(self) -> str:
        """The folder."""
        return str(self.folder)

    @property
    def names(self) -> list[str]:
        """All columns."""
        return [IMAGE, *self.facts]

    @property
    def features(self) -> Mapping[str, Any]:
        """Says which column holds pictures."""
        return {IMAGE: {"_type": "Image"}}

    @property
    def num_rows(self) -> int:
        """Number of pictures."""
        return len(self.files)

    @cached_property
    def digest(self) -> str:
        """Names the content, for the cache."""
        return files_digest(self.files)

    def read(self, columns: list[str], limit: int | None) -> Any:
        """A pyarrow table of the first rows; pictures are paths.

        Args:
            columns: which.
            limit: how many rows; ``None`` means all.

        Returns:
            The table.

        Raises:
            DataError: a column holds values of several kinds.
        """
        pyarrow = optional_module("pyarrow", package="pyarrow", extra="data")
        found = {}
        for name in columns:
            values = [{"path": str(file)} for file in self.files] if name == IMAGE else self.facts[name]
            try:
                found[name] = pyarrow.array(values[:limit])
            except pyarrow.ArrowException:
                raise DataError(
                    f'the column "{name}" holds values of several kinds', where=self.where, fix="make them alike"
                ) from None
        return pyarrow.table(found)


def is_picture_folder(path: Path) -> bool:
    """Whether a path is a folder of image files, and not one of tables.

    Args:
        path: any path.
    """
    if not path.is_dir():
        return False
    train = path / "train" if (path / "train").is_dir() else path
    if any((train / name).is_file() for name in _TABLES):
        return True
    return any(_pictures(folder) for folder in train.iterdir() if folder.is_dir())


def folder_parts(path: Path) -> tuple[PictureFolder, PictureFolder | None]:
    """Open the training part and the test part of a folder of image files.

    Args:
        path: holds ``train`` and perhaps ``test``, or is the training part itself.

    Returns:
        Both; the test part is ``None`` where there is none.

    Raises:
        DataError: a file that is named is not there, or a table cannot be read.
    """
    train = path / "train" if (path / "train").is_dir() else path
    test = next((path / name for name in _TEST_NAMES if train != path and (path / name).is_dir()), None)
    return _part(train), None if test is None else _part(test)


def _part(folder: Path) -> PictureFolder:
    table = next((folder / name for name in _TABLES if (folder / name).is_file()), None)
    if table is None:
        classes = {place.name: _pictures(place) for place in sorted(folder.iterdir()) if place.is_dir()}
        # In turn from each class, so that the first rows hold all classes.
        turns = sorted((turn, name, file) for name, files in classes.items() for turn, file in enumerate(files))
        if not turns:
            raise DataError("there are no images", where=str(folder), fix="put them into one folder per class")
        return PictureFolder(folder, tuple(file for _, _, file in turns), {LABEL: [name for _, name, _ in turns]})
    rows = _rows(table)
    files = []
    for number, row in enumerate(rows):
        file = folder / str(row.get(FILE_NAME, ""))
        if FILE_NAME not in row or not file.is_file():
            what = f'there is no file "{row[FILE_NAME]}"' if FILE_NAME in row else f'there is no "{FILE_NAME}"'
            raise DataError(f"{what} in row {number}", where=str(table), fix=f"name a file beside {table.name}")
        files.append(file)
    columns = [name for name in rows[0] if name not in (FILE_NAME, IMAGE)]
    return PictureFolder(folder, tuple(files), {name: [row.get(name) for row in rows] for name in columns})


def _rows(table: Path) -> list[dict[str, Any]]:
    try:
        text = table.read_text(encoding="utf-8")
        if table.suffix == ".csv":
            rows: list[Any] = list(csv.DictReader(io.StringIO(text)))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(
            f"the table cannot be read: {error}", where=str(table), fix="give it one row per picture"
        ) from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError("the table has no rows", where=str(table), fix="give it one row per picture")
    return rows


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()
    )
