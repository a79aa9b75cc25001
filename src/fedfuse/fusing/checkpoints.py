"""Fuse checkpoints and artifacts of one architecture by a tensor-wise rule."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fedfuse.core.artifact import Artifact
from fedfuse.core.errors import ArtifactError, ConfigError
from fedfuse.core.files import write_atomically
from fedfuse.core.payload import PayloadFile
from fedfuse.core.places import local_folder
from fedfuse.core.registry import RULES
from fedfuse.core.settings import from_json
from fedfuse.core.shards import INDEX, Shards
from fedfuse.core.streaming import TensorWriter
from fedfuse.fusing.base_model import WEIGHTS, copy_beside, open_weights
from fedfuse.rules import fuse_uploads
from fedfuse.rules.reading import Upload
from fedfuse.rules.rule import Rule, stream_fused

# What normalisation layers count; rules for weights average it.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_NAMES = (WEIGHTS, "artifact/model.safetensors")


def fuse_checkpoints(
    paths: Sequence[str | Path],
    *,
    method: str = "mean",
    weights: Sequence[float] | None = None,
    base: str | Path | None = None,
    out: str | Path,
    **settings: Any,
) -> Path:
    """Fuse artifacts or safetensors checkpoints, in one file or several, of one architecture.

    A fused checkpoint is written tensor by tensor, in as many files as the first one has, with the first one's
    configuration and tokenizer beside it; of an artifact all tensors are held at once.

    Args:
        paths: artifact folders, run folders, ``.safetensors`` files, or folders of checkpoints.
        method: name in the registry of rules.
        weights: one per path; equal if left out.
        base: where training began, named like a path, for rules that fuse differences from it.
        out: folder of the result: an artifact if the first path is one, else a checkpoint.
        settings: the rule's settings.

    Returns:
        The folder.

    Raises:
        ArtifactError: a path holds no weights, or artifacts have different recipes.
        ConfigError: a base is missing, or is given to a rule that does not look at it.
    """
    uploads = [open_weights(local_folder(path), _NAMES) for path in paths]
    recipes = [_recipe(upload.path.parent) for upload in uploads]
    if any(recipe != recipes[0] for recipe in recipes):
        raise ArtifactError(
            "the artifacts have different architectures",
            where=", ".join(map(str, paths)),
            fix="fuse artifacts of one architecture",
        )
    rule = from_json(RULES.get(method), settings, where="rule")
    if rule.of_differences != (base is not None):
        raise ConfigError(
            f'the rule "{method}" fuses differences from a base, and there is none'
            if base is None
            else f'the rule "{method}" does not look at a base',
            where="base",
            fix="name the checkpoint that all began with" if base is None else "leave base out",
        )
    start = None if base is None else open_weights(local_folder(base), _NAMES)
    folder = Path(out)
    if recipes and recipes[0] is not None:
        state = fuse_uploads(uploads, rule, weights, group="", base=start, buffers=_buffers(uploads[0]))
        info = {"rule": method, "fused": [str(path) for path in paths]}
        return Artifact(recipes[0], state, info=info).save(folder)
    if not uploads:
        fuse_uploads(uploads, rule, weights)
    if any(folder.resolve() == upload.path.parent.resolve() for upload in uploads):
        raise ConfigError("the result would lie on what it is made of", where=str(out), fix="name another folder")
    _stream(uploads, rule, weights, start, folder)
    if Path(paths[0]).is_dir():
        copy_beside(uploads[0].path.parent, folder)
    return folder


def _stream(
    uploads: Sequence[PayloadFile | Shards],
    rule: Rule,
    weights: Sequence[float] | None,
    base: Mapping[str, Any] | None,
    folder: Path,
) -> None:
    """Write the fused tensors as they come, file after file."""
    first = uploads[0]
    file_of = first.file_of if isinstance(first, Shards) else dict.fromkeys(first, WEIGHTS)
    looks = Upload(first)
    sizes = {key: found[1].itemsize for key in first if (found := looks.looks(key)) is not None}
    # Of one file after the other, and tensors of wider elements first, where a reader can map them.
    order = sorted(first, key=lambda key: (file_of[key], -sizes.get(key, 0), key))
    fused = stream_fused(uploads, rule, weights, group="", base=base, buffers=_buffers(first), order=order)
    waiting: tuple[str, Tensor] | None = next(fused, None)
    for name in sorted(set(file_of.values())):
        with TensorWriter(folder / name, [key for key in order if file_of[key] == name]) as writer:
            while waiting is not None and file_of[waiting[0]] == name:
                writer.put(*waiting)
                waiting = next(fused, None)
    if isinstance(first, Shards):
        write_atomically(folder / INDEX, first.path.read_bytes())


def _buffers(upload: Mapping[str, Any]) -> set[str]:
    return {key for key in upload if key.rpartition(".")[2] in _STATISTICS}


def _recipe(folder: Path) -> Mapping[str, Any] | None:
    try:
        recipe: Mapping[str, Any] = json.loads((folder / "fused.json").read_text(encoding="utf-8"))["recipe"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"fused.json is broken: {error}", where=str(folder), fix="copy the artifact again"
        ) from None
    return recipe
