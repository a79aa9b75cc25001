"""Reading parts of tensors from uploads, in memory or in files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fedfuse.core.errors import PayloadError
from fedfuse.core.payload import PayloadFile, Value, read_header
from fedfuse.core.shards import Shards

S = TypeVar("S")

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file.

    Args:
        shape: of the whole tensor.
        dtype: of its elements.
        offset: of its first byte in the file.
        path: of the file.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    path: Path


class Upload:
    """One upload whose tensors can be read in parts.

    Files are read by position and never mapped: mapped pages of many files would count into the process's memory.

    Args:
        values: a payload, a plain mapping, a payload's file, or a checkpoint of several files.
        stays_open: keep files open until :meth:`close`, which is faster; else they are opened for every part, because
            a cohort may have more clients than a process may hold open files.
    """

    def __init__(self, values: Mapping[str, Value], *, stays_open: bool = False) -> None:
        self.values = values
        files = [values] if isinstance(values, PayloadFile) else []
        if isinstance(values, Shards):
            files = list(values.files.values())
        self._places = {key: place for file in files for key, place in _places(file).items()}
        self._descriptors = {file.path: os.open(file.path, os.O_RDONLY) for file in files} if stays_open else {}

    def close(self) -> None:
        """Close what is open."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    @property
    def is_file(self) -> bool:
        """Whether reading goes to a file."""
        return bool(self._places)

    def looks(self, key: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        """Shape and dtype of a tensor; nothing if there is none of that key.

        Args:
            key: full key.
        """
        place = self._places.get(key)
        if place is not None:
            return place.shape, place.dtype
        value = self.values.get(key)
        return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None

    def read(self, key: str, start: int, into: Tensor) -> Tensor:
        """Some elements of a flattened tensor.

        Args:
            key: key of a tensor.
            start: position of the first element.
            into: as many elements as are wanted, of the tensor's dtype, contiguous; files are read into it.

        Returns:
            Shape ``(n,)``: ``into``, or a view of what is in memory anyway.

        Raises:
            PayloadError: the file has become shorter than its header says.
        """
        place = self._places.get(key)
        if place is None:
            value = self.values[key]
            assert isinstance(value, Tensor)
            return value.reshape(-1)[start : start + into.numel()]
        target: memoryview = into.view(torch.uint8).numpy().data if into.numel() else memoryview(b"")
        # Several threads may read from one upload.
        kept = self._descriptors.get(place.path)
        descriptor = os.open(place.path, os.O_RDONLY) if kept is None else kept
        try:
            position = place.offset + start * into.element_size()
            while target:
                count = os.preadv(descriptor, [target], position)
                if count == 0:
                    raise PayloadError(
                        f'the file ends in the middle of "{key}"',
                        where=str(place.path),
                        fix="copy the file again",
                    )
                target, position = target[count:], position + count
        finally:
            if kept is None:
                os.close(descriptor)
        return into


def in_threads(function: Callable[[S], None], items: Sequence[S], num_threads: int) -> None:
    """Call a function once per item, several at a time; torch computes on one thread in each.

    Args:
        function: called once per item, in no order.
        items: what it is called with.
        num_threads: how many work at a time; 1 works in the caller's thread, in the order of the items.
    """
    if num_threads == 1:
        for item in items:
            function(item)
        return
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(num_threads, "fedfuse-fuse", torch.set_num_threads, (1,)) as pool:
            # Looked at, so that an error is raised here.
            list(pool.map(function, items))
    finally:
        # The number that a thread sets is also what later threads of torch begin with.
        torch.set_num_threads(before)


def _places(file: PayloadFile) -> dict[str, Place]:
    """Tensors of a file that can be read by position; others, such as 8-bit floats, are read whole."""
    with file.path.open("rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
    return {
        key: Place(tuple(facts["shape"]), _DTYPES[facts["dtype"]], start + int(facts["data_offsets"][0]), file.path)
        for key, facts in read_header(file.path).items()
        if key != "__metadata__" and facts.get("dtype") in _DTYPES
    }
