"""Files by path or by URL: a folder, a memory stick, an S3 bucket; whatever fsspec knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedfuse.core.errors import ConfigError
from fedfuse.core.files import write_atomically


def is_url(place: str) -> bool:
    """Whether a place is no path.

    Args:
        place: a path, or a URL such as ``s3://bucket/folder``.
    """
    return "://" in place


def list_files(folder: str, suffix: str) -> list[str]:
    """The files of a folder and of the folders in it.

    Args:
        folder: path or URL.
        suffix: how their names end.

    Returns:
        Paths or URLs, sorted; names that begin with a dot are left out, such files are not complete yet.

    Raises:
        ConfigError: there is no such folder, or it cannot be reached.
    """
    if not is_url(folder):
        root = Path(folder)
        if not root.is_dir():
            raise ConfigError("there is no such folder", where=folder, fix="name the folder that holds the files")
        found = [path for path in root.rglob(f"*{suffix}") if path.is_file() and not path.name.startswith(".")]
        return sorted(str(path) for path in found)
    system, path = _system(folder)
    try:
        names = system.find(path)
    except Exception as error:  # each kind of storage has errors of its own
        raise _unreachable(folder, error) from None
    whole = [name for name in names if name.endswith(suffix) and not name.rpartition("/")[2].startswith(".")]
    return sorted(system.unstrip_protocol(name) for name in whole)


def read_file(place: str, *, max_bytes: int) -> bytes:
    """The bytes of a file.

    Args:
        place: path or URL.
        max_bytes: larger files are refused before they are read.

    Raises:
        ConfigError: it cannot be read, or is too large.
    """
    try:
        if is_url(place):
            system, path = _system(place)
            size = int(system.size(path) or 0)
        else:
            size = Path(place).stat().st_size
        if size > max_bytes:
            raise ConfigError(
                f"{size:,} bytes are more than the limit of {max_bytes:,}",
                where=place,
                fix="raise federation.max_upload_bytes if this is meant",
            )
        data: bytes = system.cat_file(path) if is_url(place) else Path(place).read_bytes()
    except ConfigError:
        raise
    except Exception as error:
        raise _unreachable(place, error) from None
    return data


def write_file(place: str, data: bytes) -> None:
    """Write a file, whole or not at all.

    Args:
        place: path or URL.
        data: the content.

    Raises:
        FedfuseError: it cannot be written.
    """
    if not is_url(place):
        write_atomically(Path(place), data)
        return
    system, path = _system(place)
    try:
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
        # Object stores show a file once it is complete.
        system.pipe_file(path, data)
    except Exception as error:
        raise _unreachable(place, error) from None


def _system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(url)
    except (ImportError, ValueError, OSError) as error:
        raise ConfigError(
            f"this kind of place cannot be reached: {error}", where=url, fix="install what fsspec names for it"
        ) from None
    return system, str(path)


def _unreachable(place: str, error: Exception) -> ConfigError:
    reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return ConfigError(f"the place cannot be used: {reason}", where=place, fix="check the name and your access to it")
