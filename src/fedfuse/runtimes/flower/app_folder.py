"""The Flower app folder that comes with the package, for those who run Flower already."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from fedfuse.core.errors import ConfigError
from fedfuse.core.files import write_atomically


def app_files() -> dict[str, bytes]:
    """The folder's files: path to content, in the order of the paths."""
    found: dict[str, bytes] = {}

    def gather(folder: Traversable, prefix: str) -> None:
        for entry in folder.iterdir():
            if entry.is_dir() and entry.name != "__pycache__":
                gather(entry, f"{prefix}{entry.name}/")
            elif entry.is_file():
                found[prefix + entry.name] = entry.read_bytes()

    gather(files("fedfuse.runtimes.flower").joinpath("app"), "")
    return dict(sorted(found.items()))


def write_app_folder(folder: Path) -> list[Path]:
    """Write the app folder.

    Args:
        folder: it must not be there, or be empty.

    Returns:
        The files.

    Raises:
        ConfigError: the folder holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError("the folder is not empty", where=str(folder), fix="name a new folder")
    paths = []
    for name, content in app_files().items():
        write_atomically(folder / name, content)
        paths.append(folder / name)
    return paths
