"""Fuse files that people already have: checkpoints and artifacts, by a tensor-wise rule."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedfuse.core.artifact import Artifact
from fedfuse.core.errors import ArtifactError, ConfigError
from fedfuse.core.files import write_atomically
from fedfuse.core.payload import Payload, PayloadFile
from fedfuse.core.registry import RULES
from fedfuse.core.settings import from_json
from fedfuse.rules.rule import fuse_uploads

# What normalisation layers count; rules for weights average it.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "artifact/model.safetensors")


def fuse(
    paths: Sequence[str | Path],
    *,
    method: str = "mean",
    weights: Sequence[float] | None = None,
    base: str | Path | None = None,
    out: str | Path,
    **settings: Any,
) -> Path:
    """Fuse artifacts or safetensors checkpoints of one architecture by a rule.

    Tensors are read one chunk at a time, so memory does not grow with the number of files; slerp, karcher and ties
    hold one whole tensor of each file.

    Args:
        paths: artifact folders, run folders, or ``.safetensors`` files.
        method: name in the registry of rules.
        weights: one per path; equal if left out.
        base: where training began, named like a path; needed by the rules that fuse differences from it: dare,
            task_arithmetic, ties.
        out: folder of the result: an artifact if the first path is one, else ``model.safetensors`` alone.
        settings: the rule's settings.

    Returns:
        The folder.

    Raises:
        ArtifactError: a path holds no weights, or artifacts have different recipes.
        ConfigError: a base is missing, or is given to a rule that does not look at it.
    """
    files = [_weights_file(Path(path)) for path in paths]
    recipes = [_recipe(file.parent) for file in files]
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
    uploads = [PayloadFile(file) for file in files]
    state = fuse_uploads(
        uploads,
        rule,
        weights,
        group="",
        base=None if base is None else PayloadFile(_weights_file(Path(base))),
        buffers={key for upload in uploads[:1] for key in upload if key.rpartition(".")[2] in _STATISTICS},
    )
    folder = Path(out)
    if recipes[0] is not None:
        return Artifact(recipes[0], state, info={"rule": method, "fused": [str(path) for path in paths]}).save(folder)
    write_atomically(folder / "model.safetensors", Payload(dict(state)).encode())
    return folder


def _weights_file(path: Path) -> Path:
    candidates = [path] if path.is_file() else [path / name for name in _WEIGHTS]
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        raise ArtifactError(
            "there are no weights", where=str(path), fix="name an artifact's folder or a .safetensors file"
        )
    return found


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
