"""Paths that may also be names of models on a hub."""

from __future__ import annotations

import re
from pathlib import Path

from fedfuse.core.errors import ArtifactError, ConfigError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?\Z")
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def local_folder(place: str | Path) -> Path:
    """Where a model lies on this machine; a name on the hub is fetched first.

    Args:
        place: a path, or ``OWNER/NAME`` or ``OWNER/NAME@REVISION`` on the Hugging Face hub where there is neither such
            a path nor a folder ``OWNER``.

    Returns:
        The path; it need not be there where it cannot be a name on the hub.

    Raises:
        ConfigError: the hub's client is not installed.
        ArtifactError: the hub did not give it.
    """
    path = Path(place)
    # A slip in the name of a folder that is here must not ask the world.
    if path.exists() or path.parent.exists() or not isinstance(place, str) or not _HUB_ID.match(place):
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(
            "there is no such path, and names on the hub need a package that is not installed",
            where=place,
            fix='check the path, or pip install "fedfuse[hf]"',
        ) from None
    name, _, revision = place.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=_WANTED))
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ArtifactError(
            f"there is no such path, and the hub did not give it: {reason:.200}", where=place, fix="check the path"
        ) from None
