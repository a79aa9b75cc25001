"""What leaves a client, in words: for its owner, before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedfuse.core.coding import plain_key
from fedfuse.core.payload import Payload, matches


@dataclass(frozen=True)
class UploadRow:
    """One key of an upload.

    Args:
        key: its key.
        kind: its dtype, or the type of a scalar.
        shape: shape of a tensor, or the value of a scalar.
        num_bytes: its size.
        what: what the task says that it is.
    """

    key: str
    kind: str
    shape: str
    num_bytes: int
    what: str


def upload_rows(upload: bytes, declared: Mapping[str, str]) -> list[UploadRow]:
    """What an upload holds, key by key.

    Args:
        upload: encoded.
        declared: the task's declaration: pattern of keys to what they are.

    Returns:
        In the order of the keys.
    """
    rows = []
    for key, value in Payload.decode(upload).items():
        own_key = plain_key(key)
        what = next((text for pattern, text in declared.items() if matches(own_key, [pattern])), "")
        if own_key != key:
            what = f"in a code: {what}" if what else "part of a code"
        if isinstance(value, Tensor):
            kind, shape = str(value.dtype).removeprefix("torch."), " x ".join(map(str, value.shape)) or "one number"
            rows.append(UploadRow(key, kind, shape, value.numel() * value.element_size(), what))
        else:
            rows.append(UploadRow(key, type(value).__name__, str(value), len(str(value)), what))
    return rows


def refused_key(upload: bytes, patterns: list[str]) -> str | None:
    """The first key that the owner does not let go.

    Args:
        upload: encoded.
        patterns: keys or ``group/*`` that must not leave.

    Returns:
        The key; ``None`` if all may leave.
    """
    # A code says what its tensor says.
    own_keys = (plain_key(key) for key in Payload.decode(upload))
    return next((key for key in own_keys if matches(key, patterns)), None)
