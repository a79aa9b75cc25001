"""Decoded tensors kept on disk, so that images are decoded once."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from fedfuse.core.errors import JournalError, PayloadError
from fedfuse.core.files import write_atomically
from fedfuse.core.payload import Payload

_FORMAT = 1


def cache_folder() -> Path:
    """Where decoded data is kept: ``$FEDFUSE_CACHE``, else ``~/.cache/fedfuse``."""
    named = os.environ.get("FEDFUSE_CACHE", "")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "fedfuse"


def files_digest(files: Iterable[Path]) -> str:
    """SHA-256 over names, sizes and times of change; a changed file has another one.

    Args:
        files: existing files, in the order that matters.

    Returns:
        64 hexadecimal digits.
    """
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def cache_path(*parts: int | str | bool | None) -> Path:
    """The cache file of what these parts describe.

    Args:
        parts: a digest of the files and every setting that changes the tensor.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, *parts]).encode()).hexdigest()
    return cache_folder() / "data" / f"{digest}.safetensors"


def read_cached(path: Path) -> Tensor | None:
    """Read a tensor from its cache file.

    Args:
        path: from :func:`cache_path`.

    Returns:
        The tensor; ``None`` if there is no such file or it is damaged.
    """
    try:
        payload = Payload.decode(path.read_bytes())
        tensor = payload.tensor("x")
        return tensor if payload.number("crc32") == _checksum(tensor) else None
    except (OSError, PayloadError):
        return None


def cached(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """Read a tensor from its cache file, or make it and keep it there.

    A damaged file is made anew. Where the cache cannot be written, a warning says so and the data is used all the same.

    Args:
        path: from :func:`cache_path`.
        make: called only if the file does not give the tensor.

    Returns:
        The tensor.
    """
    found = read_cached(path)
    if found is not None:
        return found
    tensor = make()
    try:
        write_atomically(path, Payload({"x": tensor, "crc32": _checksum(tensor)}).encode())
    except (OSError, JournalError) as error:
        reason = error.what if isinstance(error, JournalError) else error.strerror
        warnings.warn(
            f"decoded data is not kept in {path.parent}: {reason}; set FEDFUSE_CACHE to another folder", stacklevel=2
        )
    return tensor


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(-1).numpy().data)
