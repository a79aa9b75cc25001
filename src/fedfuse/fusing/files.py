"""The one door to fusing files: it sees what kind they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedfuse.core.errors import ArtifactError, ConfigError
from fedfuse.core.places import local_folder
from fedfuse.fusing.adapter import FILE
from fedfuse.fusing.adapter_config import FILE as CONFIG_FILE
from fedfuse.fusing.adapters import fuse_adapters
from fedfuse.fusing.checkpoints import fuse_checkpoints
from fedfuse.fusing.pipeline_file import FILE as PIPELINE_FILE


def fuse(
    paths: Sequence[str | Path],
    *,
    method: str = "",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    base: str | Path | None = None,
    out: str | Path,
    **settings: Any,
) -> Path:
    """Fuse artifacts, checkpoints or LoRA adapters of one architecture by a rule.

    Tensors are read one chunk at a time, so memory does not grow with the number of files; slerp, karcher and ties
    hold one whole tensor of each file.

    Args:
        paths: artifact folders, run folders, ``.safetensors`` files, folders of checkpoints in one file or several, or
            folders of adapters as PEFT or diffusers save them. Where there is no such path: names on the Hugging Face
            hub.
        method: name in the registry of rules, for adapters also of adapter rules; if left out ``mean``, for adapters
            ``flora``.
        weights: one per path; equal if left out.
        rank: of a fused adapter, where the rule chooses one.
        base: where training began, named like a path; needed by the rules that fuse differences from it: dare,
            task_arithmetic, ties. For adapters the base model that ``merge`` changes.
        out: folder of the result: an artifact if the first path is one, an adapter if all are, else a checkpoint.
        settings: the rule's settings.

    Returns:
        The folder.

    Raises:
        ArtifactError: adapters and whole models are mixed.
        ConfigError: a rank is given for whole models.
    """
    places = [local_folder(path) for path in paths]
    are_adapters = [is_adapter(place) for place in places]
    if any(are_adapters):
        if not all(are_adapters):
            other = places[are_adapters.index(False)]
            raise ArtifactError(
                "adapters and whole models do not mix", where=str(other), fix="merge the adapters into their base first"
            )
        return fuse_adapters(
            paths, method=method or "flora", weights=weights, rank=rank, base=base, out=out, **settings
        ).folder
    if rank is not None:
        raise ConfigError("whole models have no rank", where="rank", fix="leave rank out")
    return fuse_checkpoints(places, method=method or "mean", weights=weights, base=base, out=out, **settings)


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter as PEFT or a diffusers pipeline saves it, whole or not.

    Args:
        path: any path.

    Returns:
        Whether one of its files is there.
    """
    return any((path / name).is_file() for name in (CONFIG_FILE, FILE, PIPELINE_FILE, "adapter_model.bin"))
