"""The header of an encoded payload: everything about its tensors but their numbers.

Whatever somebody sends is judged here before memory is taken for it: what a header claims is compared with the bytes
that are there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedfuse.core.errors import PayloadError

METADATA = "__metadata__"
"""The one name in a header that is no tensor's."""

MAX_HEADER_BYTES = 16 << 20
"""Parsed JSON takes many times the memory of its text. A tensor needs about 100 bytes of header."""

_MAX_DIMENSIONS = 64
"""Torch stores more but cannot compute with them."""

_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}

_FIX = "send what Payload.encode() gives, whole"


def read_header(data: bytes | Path) -> dict[str, Any]:
    """Parse the header of an encoded payload without reading its tensors.

    Args:
        data: encoded bytes, or the path of a file of them.

    Returns:
        The header: per tensor ``dtype``, ``shape`` and ``data_offsets``, and ``__metadata__``. What it says of the
        tensors is not judged; :func:`checked_header` does.

    Raises:
        PayloadError: the header is broken or does not fit the length of the data.
    """
    return _parse(data)[0]


def checked_header(data: bytes | Path) -> dict[str, Any]:
    """Parse a header and compare what it says of the tensors with the bytes that are there.

    Args:
        data: encoded bytes, or the path of a file of them.

    Returns:
        The header. Its tensors can be made, and take as many bytes as the data has.

    Raises:
        PayloadError: the header is broken, or its tensors are not those of the data.
    """
    header, num_bytes = _parse(data)
    spans = sorted(_span(name, entry) for name, entry in header.items() if name != METADATA)
    position = 0
    for begin, end in spans:
        if begin != position:
            raise _refused("its tensors overlap or leave a hole")
        position = end
    if position != num_bytes:
        raise _refused(f"its tensors take {position:,} bytes, {num_bytes:,} are there")
    return header


def _parse(data: bytes | Path) -> tuple[dict[str, Any], int]:
    """The header, and the number of bytes after it."""
    if isinstance(data, Path):
        size = data.stat().st_size
        with data.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            raw = file.read(length) if length <= min(size - 8, MAX_HEADER_BYTES) else b""
    else:
        size, start = len(data), bytes(data[:8])
        length = int.from_bytes(start, "little")
        raw = bytes(data[8 : 8 + length]) if length <= min(size - 8, MAX_HEADER_BYTES) else b""
    if len(start) < 8 or length > size - 8:
        raise _refused(f"{size} bytes with a header of {length}")
    if length > MAX_HEADER_BYTES:
        raise _refused(f"its header of {length:,} bytes is longer than {MAX_HEADER_BYTES:,}")
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_table)
    except PayloadError:
        raise
    except (ValueError, RecursionError):
        raise _refused("the header is not JSON") from None
    if not isinstance(header, dict):
        raise _refused("the header is not a table")
    return header, size - 8 - length


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Readers of JSON disagree on which of two entries of one name counts.
    table = dict(pairs)
    if len(table) < len(pairs):
        raise _refused("a name stands twice in the header")
    return table


def _span(name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes begin and end, if they can be a tensor."""
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _refused(f"{name!r:.80} is described in another way than a tensor is")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise _refused(f"{name!r:.80} has the dtype {dtype!r:.20}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise _refused(f"{name!r:.80} has the shape {shape!r:.80}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _refused(f"{name!r:.80} has the place {offsets!r:.80}")
    # A tensor without elements takes no bytes, whatever its other sizes; torch computes its strides all the same.
    if math.prod(size or 1 for size in shape) * _ITEM_BYTES[dtype] >= 1 << 63:
        raise _refused(f"{name!r:.80} has the shape {shape!r:.80}")
    if math.prod(shape) * _ITEM_BYTES[dtype] != offsets[1] - offsets[0]:
        raise _refused(f"{name!r:.80} of {dtype} {shape!r:.80} is not {offsets[1] - offsets[0]:,} bytes")
    return offsets[0], offsets[1]


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _refused(reason: str) -> PayloadError:
    return PayloadError(f"the bytes are not a payload: {reason}", fix=_FIX)
