"""Base models: from a folder, from a hub, or drawn from a configuration."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedfuse.core.errors import ArtifactError, ConfigError, ModelError
from fedfuse.core.places import local_folder
from fedfuse.core.seeding import Rng

PLACES = "FEDFUSE_BASE_MODELS"
"""Environment variable: a folder where base models lie under the last part of their names, for machines on which they
are not where the configuration says."""

_CACHED = 4


def base_of(path: str | None, config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What names a base model in a recipe.

    Args:
        path: a folder or a name on the hub; ``None`` draws weights.
        config: of transformers, with ``model_type``; beside a path, what differs from the folder's own.
        seed: weights are drawn from it where there is no path.

    Returns:
        JSON: with a path also the digest of the weights, so that nobody computes with another base.

    Raises:
        ConfigError: there is neither, or no such folder.
    """
    if path is not None:
        folder = base_folder(path)
        return {"path": path, "digest": weights_digest(folder), "config": dict(config)}
    if "model_type" not in config:
        raise ConfigError(
            "there is no model to start from",
            where="model.path",
            fix="give path: a folder or a name on the hub, or config: {model_type: llama, hidden_size: 64, ...}",
        )
    return {"config": dict(config), "seed": seed}


def base_folder(path: str) -> Path:
    """Where a base model lies on this machine.

    Args:
        path: a folder, or a name on the hub.

    Raises:
        ConfigError: it is not there.
    """
    elsewhere = os.environ.get(PLACES)
    if elsewhere and not Path(path).is_dir():
        folder = Path(elsewhere) / path.rstrip("/").rpartition("/")[2]
        if folder.is_dir():
            return folder
    try:
        folder = local_folder(path)
    except ArtifactError as error:
        raise ConfigError(error.what, where=f"model.path: {path}", fix=f"check the name, or set {PLACES}") from None
    if not (folder / "config.json").is_file():
        raise ConfigError(
            "there is no config.json" if folder.is_dir() else "there is no such folder",
            where=f"model.path: {path}",
            fix=f"name a folder that save_pretrained wrote, or set {PLACES} to the folder where base models lie",
        )
    return folder


def weights_digest(folder: Path) -> str:
    """SHA-256 over the safetensors files of a folder.

    Args:
        folder: of a model.

    Returns:
        64 hexadecimal digits.

    Raises:
        ConfigError: there are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            "there are no weights in safetensors",
            where=f"model.path: {folder}",
            fix="save the model again: model.save_pretrained(folder)",
        )
    return _digest(tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=64)
def _digest(files: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, _, _ in files:
        with open(name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load_base(base: Mapping[str, Any], kind: str, **config: Any) -> nn.Module:
    """A base model whose weights share their memory with every other copy in this process.

    Args:
        base: what :func:`base_of` gave.
        kind: name of the class of transformers that builds it, such as ``AutoModelForCausalLM``.
        config: settings of the model's configuration that this use needs, such as ``num_labels``.

    Returns:
        The model, in training mode; replace weights that are changed, never write into them.

    Raises:
        ModelError: it cannot be built, or the folder holds other weights than the recipe says.
    """
    pristine = _pristine(json.dumps(base, sort_keys=True), kind, json.dumps(config, sort_keys=True))
    shared = {
        id(parameter): nn.Parameter(parameter.data, requires_grad=parameter.is_floating_point())
        for parameter in pristine.parameters()
    }
    return copy.deepcopy(pristine, memo=dict(shared))


@lru_cache(maxsize=_CACHED)
def _pristine(base_text: str, kind: str, config_text: str) -> nn.Module:
    transformers = library("transformers")
    base, settings = json.loads(base_text), json.loads(config_text)
    factory = getattr(transformers, kind)
    own = dict(base.get("config", {}))
    try:
        with Rng(base.get("seed", 0)).ambient("base model"), warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            if "path" not in base:
                config = transformers.AutoConfig.for_model(own.pop("model_type"), **own, **settings)
                return _ready(factory.from_config(config, dtype=torch.float32))
            folder = base_folder(base["path"])
            if weights_digest(folder) != base["digest"]:
                raise ModelError(
                    "the base model here has other weights than the one that was agreed on",
                    where=f"model.path: {folder}",
                    fix="take the same version of the base model",
                )
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **own, **settings)
            return _ready(
                factory.from_pretrained(
                    folder,
                    config=config,
                    local_files_only=True,
                    use_safetensors=True,
                    trust_remote_code=False,
                    dtype=torch.float32,
                )
            )
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"the base model cannot be built: {reason:.200}",
            where=f"model.path: {base['path']}" if "path" in base else "model.config",
            fix="check the settings of the model's configuration",
        ) from None


def _ready(model: nn.Module) -> nn.Module:
    # Caches of keys and values serve generation only, and break the packing of batches in training.
    model.config.use_cache = False  # type: ignore[union-attr]
    return model.train()


def library(name: str) -> Any:
    """A library of Hugging Face, imported when it is needed.

    Args:
        name: ``transformers``, ``peft`` or ``diffusers``.

    Raises:
        ConfigError: it is not installed.
    """
    import importlib

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"foundation models need {name}: {error}", where="model.family", fix='pip install "fedfuse[hf]"'
        ) from None


class quiet:  # noqa: N801 # a context manager that reads like a verb
    """Keep transformers from reporting on weights that are new on purpose, for a while."""

    def __enter__(self) -> None:
        logging = library("transformers").utils.logging
        self._verbosity, self._has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *exception: object) -> None:
        logging = library("transformers").utils.logging
        logging.set_verbosity(self._verbosity)
        if self._has_bars:
            logging.enable_progress_bar()
