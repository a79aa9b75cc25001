"""What an upload must look like, and the check before it is stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedfuse.core.coding import Coding, plain_key
from fedfuse.core.errors import PayloadError, UploadRefused
from fedfuse.core.payload import Payload, Value, matches, read_header

Expectation = Mapping[str, Any]
"""What an upload must look like: key to a tensor or :class:`TensorSpec` (same shape and dtype), or a scalar's type."""

_SLACK_BYTES = 1 << 20
_MAX_CURVE_POINTS = 1 << 16


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype that an uploaded tensor must have.

    Args:
        shape: sizes; ``None`` accepts any size of that dimension.
        dtype: the element type.
    """

    shape: tuple[int | None, ...]
    dtype: torch.dtype = torch.float32


def check_upload(
    client_id: str,
    data: bytes,
    declared: Mapping[str, str],
    expect: Expectation | None,
    max_upload_bytes: int,
    coding: Coding | None = None,
) -> None:
    """Refuse an upload that is not what the task declared and the server expects.

    Args:
        client_id: who sent it, for the message.
        data: the encoded upload.
        declared: patterns of keys that the task may upload.
        expect: shapes, dtypes and scalar types by key; ``None`` if the server cannot know.
        max_upload_bytes: largest size that is accepted, as it crossed and as it is read.
        coding: how uploads are coded; ``None`` where they are not.

    Raises:
        UploadRefused: the reason, with client and key.
    """

    def refuse(reason: str, key: str = "") -> UploadRefused:
        where = f"client {client_id}" + (f", key {key!r:.120}" if key else "")
        return UploadRefused(
            f"the upload was refused: {reason}", where=where, fix="the client must send what the task declares"
        )

    limit = max_upload_bytes
    if expect is not None:
        limit = min(limit, 2 * sum(_expected_bytes(value) for value in expect.values()) + _SLACK_BYTES)
    if len(data) > limit:
        raise refuse(f"{len(data):,} bytes are more than the limit of {limit:,}")
    try:
        # The header alone tells undeclared keys and wrong shapes before any tensor is made.
        header = read_header(data)
        keys = [key for key in header if key != "__metadata__"]
        own_key = plain_key if coding else str
        undeclared = sorted(own_key(key) for key in keys if not matches(own_key(key), declared))
        if undeclared:
            raise refuse("the key was not declared", undeclared[0])
        payload: Mapping[str, Value] = Payload.decode(data)
        if coding is not None:
            # A few bytes may stand for a large tensor: how large is told before it is made.
            payload = opened = coding.open(payload)
            if opened.num_bytes > limit:
                raise refuse(f"its codes stand for {opened.num_bytes:,} bytes, more than the limit of {limit:,}")
    except PayloadError as error:
        raise refuse(error.what) from None
    undeclared = [key for key in payload if not matches(key, declared)]
    if undeclared:
        raise refuse("the key was not declared", undeclared[0])
    if expect is not None:
        for key in sorted(set(expect) - set(payload)):
            raise refuse("the key is missing", key)
        for key in sorted(set(payload) - set(expect)):
            if not key.startswith("curve/"):
                raise refuse("the key was not expected", key)
    for key in payload:
        try:
            value = payload[key]
        except PayloadError as error:
            raise refuse(error.what, key) from None
        reason = _excess(key, value, max_upload_bytes) or _mismatch(value, expect.get(key) if expect else None)
        if reason:
            raise refuse(reason, key)


def _expected_bytes(value: Tensor | TensorSpec | type) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, TensorSpec) and None not in value.shape:
        return math.prod(size or 0 for size in value.shape) * value.dtype.itemsize
    return 1 << 24


def _excess(key: str, value: Value, max_bytes: int) -> str:
    """Why a value would take the server more memory than its bytes do; empty if it would not."""
    if not isinstance(value, Tensor):
        return ""
    if not value.numel() and math.prod(size or 1 for size in value.shape) * value.element_size() > max_bytes:
        return f"its shape {tuple(value.shape)} has no element and sizes beyond the limit of {max_bytes:,} bytes"
    if key.startswith("curve/") and value.numel() > _MAX_CURVE_POINTS:
        return f"a curve of {value.numel():,} points is longer than {_MAX_CURVE_POINTS:,}"
    return ""


def _mismatch(value: Value, expected: Tensor | TensorSpec | type | None) -> str:
    """Why a value is not acceptable; empty if it is."""
    if isinstance(value, Tensor):
        if _has_holes(value):
            return "it holds NaN or infinite values"
        if isinstance(expected, type):
            return f"it is a tensor, wanted a {expected.__name__}"
        if expected is not None and value.dtype != expected.dtype:
            return f"its dtype is {value.dtype}, wanted {expected.dtype}"
        if expected is not None and not _fits(tuple(value.shape), tuple(expected.shape)):
            return f"its shape is {tuple(value.shape)}, wanted {tuple(expected.shape)}"
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        return "it holds NaN or infinite values"
    if expected is not None and (not isinstance(expected, type) or type(value) is not expected):
        wanted = expected.__name__ if isinstance(expected, type) else "tensor"
        return f"it is a {type(value).__name__}, wanted a {wanted}"
    return ""


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(want in (None, have) for want, have in zip(wanted, shape, strict=True))


def _has_holes(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return False
    # In parts: the test takes several times the memory of what is tested. And torch stores numbers of 8 bits but can
    # hardly compute with them.
    parts = tensor.reshape(-1).split(1 << 22)
    return not all(bool(torch.isfinite(p.float() if p.element_size() == 1 else p).all()) for p in parts)
