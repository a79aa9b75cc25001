"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from fedfuse.core.errors import ConfigError, JournalError


def write_atomically(path: Path, data: bytes, *, syncs_folder: bool = True) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part.

    Args:
        path: where; its folder is made if it is not there.
        data: the whole content.
        syncs_folder: make the rename itself survive a power cut; not needed where a later write to the same folder
            does.

    Raises:
        JournalError: the disk is full or may not be written; the old file, if any, is still there.
    """
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            # A temporary file is private; the one that takes its name is not.
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if not syncs_folder:
            return
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        raise JournalError(
            f"cannot write: {error.strerror}",
            where=str(path),
            fix="free disk space or name another folder, then run the same command again",
        ) from None


def write_private(path: Path, data: bytes) -> None:
    """Write a new file that nobody but its owner may read, at no time.

    Args:
        path: where; there must be none yet.
        data: the whole content, for instance a private key.

    Raises:
        ConfigError: there is such a file, or it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigError(
            f"cannot write the key: {error.strerror}", where=str(path), fix="name a place where there is none yet"
        ) from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def remove_unfinished(folder: Path) -> None:
    """Remove what a process that was killed while it wrote has left in a folder and below it.

    Args:
        folder: in which nobody else is writing.
    """
    for path in folder.rglob(".*.part"):
        path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
