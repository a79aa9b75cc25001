"""Checkpoints that lie in several safetensors files with an index."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from fedfuse.core.errors import PayloadError
from fedfuse.core.payload import PayloadFile, Value

INDEX = "model.safetensors.index.json"
"""The file's name that says which tensor lies where."""


class Shards(Mapping[str, Value]):
    """Tensors of several files, read lazily.

    Args:
        index: a JSON file whose ``weight_map`` says in which file beside it a tensor lies.

    Raises:
        PayloadError: the index is broken, or a file does not hold what it says.
    """

    def __init__(self, index: Path) -> None:
        self.path = index
        try:
            table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise PayloadError(
                f"the index is broken: {type(error).__name__}: {error}",
                where=str(index),
                fix="copy the checkpoint again",
            ) from None
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
            raise PayloadError("the index is broken: it has no weight_map", where=str(index))
        self.file_of: dict[str, str] = table
        self.files: dict[str, PayloadFile] = {}
        for name in sorted(set(table.values())):
            # An index that names a file elsewhere would have it read.
            if Path(name).name != name or not (index.parent / name).is_file():
                raise PayloadError(
                    f'the file "{name}" of the index is not there', where=str(index), fix="copy the checkpoint again"
                )
            self.files[name] = PayloadFile(index.parent / name)
        held = {name: set(file) for name, file in self.files.items()}
        for key, name in table.items():
            if key not in held[name]:
                raise PayloadError(f'"{name}" does not hold "{key}", as its index says', where=str(index))

    def __getitem__(self, key: str) -> Value:
        return self.files[self.file_of[key]][key]

    def __contains__(self, key: object) -> bool:
        # The inherited one would read the tensor.
        return key in self.file_of

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.file_of))

    def __len__(self) -> int:
        return len(self.file_of)
