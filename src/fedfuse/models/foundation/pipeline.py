"""The parts of a text-to-image pipeline of diffusers: from a folder, from the hub, or drawn from a configuration."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedfuse.core.errors import ConfigError, ModelError
from fedfuse.core.seeding import Rng
from fedfuse.models.foundation.base import PLACES, library, quiet, weights_digest

DENOISERS: Mapping[str, str] = {"unet": "UNet2DConditionModel", "transformer": "PixArtTransformer2DModel"}
"""Parts that predict the noise, and the class of diffusers that is taken where a configuration names none."""

ENCODERS = ("text_encoder", "text_encoder_2")
"""Parts that read captions."""

_KNOWN_DENOISERS = tuple(DENOISERS.values())
_KNOWN_ENCODERS = {
    "CLIPTextModel": "CLIPTextConfig",
    "CLIPTextModelWithProjection": "CLIPTextConfig",
    "T5EncoderModel": "T5Config",
}
_VAE = "AutoencoderKL"
_ZEROES_EMPTY = "force_zeros_for_empty_prompt"
_WEIGHTED = (*DENOISERS, *ENCODERS, "vae")
_LARGEST_VOCABULARY = 512


class Pipeline(nn.Module):
    """The networks of a pipeline and what belongs to them.

    Args:
        kind: ``unet`` or ``transformer``.
        denoiser: predicts the noise.
        encoders: read captions; their hidden states are joined.
        vae: turns pictures into latents; ``None`` works on pixels.
        schedule: configuration of the scheduler.
        pad_ids: of each encoder, what stands in place of a token where a caption has ended.
        empty_ids: tokens of a caption without words.
        folder: where it came from; its tokenizers are there.
        zeroes_empty: whether a caption without words is zeros for the denoiser, as SDXL has it.
    """

    def __init__(
        self,
        kind: str,
        denoiser: nn.Module,
        encoders: list[nn.Module],
        vae: nn.Module | None,
        schedule: Mapping[str, Any],
        pad_ids: tuple[int, ...],
        empty_ids: tuple[int, ...],
        folder: Path | None = None,
        zeroes_empty: bool = False,
    ) -> None:
        super().__init__()
        self.kind, self.schedule, self.pad_ids, self.empty_ids = kind, dict(schedule), pad_ids, empty_ids
        self.denoiser, self.encoders, self.vae, self.folder = denoiser, nn.ModuleList(encoders), vae, folder
        self.zeroes_empty = zeroes_empty


def pipeline_base(path: str | None, config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What names a pipeline in a recipe.

    Args:
        path: a folder or a name on the hub; ``None`` draws weights.
        config: configuration of each part, by the part's name.
        seed: weights are drawn from it where there is no path.

    Returns:
        JSON: with a path also the digest of all weights, so that nobody computes with another base.

    Raises:
        ConfigError: there is neither or both, no such folder, or a part is missing or not known.
    """
    if path is not None and config:
        raise ConfigError("there are both a path and a config", where="model", fix="leave one of them out")
    if path is not None:
        return {"path": path, "digest": _digest(pipeline_folder(path))}
    for name in config:
        if name not in (*_WEIGHTED, "scheduler"):
            raise ConfigError(
                f'a pipeline has no part "{name}"',
                where="model.config",
                fix=f"its parts are {', '.join(_WEIGHTED)} and scheduler",
            )
    _denoiser_name(config, "model.config")
    if "text_encoder" not in config:
        raise ConfigError(
            "the pipeline has no text_encoder",
            where="model.config",
            fix="give text_encoder: {hidden_size: 64, vocab_size: 300, ...}",
        )
    return {"config": {name: dict(part) for name, part in config.items()}, "seed": seed}


def pipeline_folder(path: str) -> Path:
    """Where a pipeline lies on this machine.

    Args:
        path: a folder, or a name on the hub.

    Raises:
        ConfigError: it is not there, or lacks a part.
    """
    folder, elsewhere = Path(path).expanduser(), os.environ.get(PLACES)
    if elsewhere and not folder.is_dir():
        folder = Path(elsewhere) / path.rstrip("/").rpartition("/")[2]
    if not folder.is_dir() and path.count("/") == 1 and path[:1] not in ".~/" and not Path(path).parent.exists():
        folder = _downloaded(path)
    if not folder.is_dir():
        raise ConfigError(
            "there is no such folder",
            where=f"model.path: {path}",
            fix=f"name a folder that save_pretrained wrote, or set {PLACES} to the folder where base models lie",
        )
    parts = [place.name for place in folder.iterdir() if place.is_dir()]
    _denoiser_name(parts, f"model.path: {path}")
    for part in ("text_encoder", "scheduler"):
        if part not in parts:
            raise ConfigError(
                f"the pipeline has no {part}",
                where=f"model.path: {path}",
                fix="name the folder of a text-to-image pipeline",
            )
    return folder


def load_pipeline(base: Mapping[str, Any]) -> Pipeline:
    """A pipeline whose weights share their memory with every other copy in this process.

    Args:
        base: what :func:`pipeline_base` gave.

    Returns:
        The parts; replace weights that are changed, never write into them.

    Raises:
        ModelError: it cannot be built, or the folder holds other weights than the recipe says.
    """
    pristine = _pristine(json.dumps(base, sort_keys=True))
    shared = {id(p): nn.Parameter(p.data, requires_grad=p.is_floating_point()) for p in pristine.parameters()}
    return copy.deepcopy(pristine, memo=dict(shared))


def save_pipeline(pipeline: Pipeline, folder: str | Path) -> Path:
    """Write a pipeline as diffusers does, part by part.

    Args:
        pipeline: without adapters in it.
        folder: made if it is not there.

    Returns:
        The folder. The tokenizers of the folder that it came from are in it too; where it came from none, the tokenizer
        is to be put into its folder ``tokenizer``.
    """
    place = Path(folder)
    index = {"_class_name": "DiffusionPipeline", **({_ZEROES_EMPTY: True} if pipeline.zeroes_empty else {})}
    parts = {pipeline.kind: pipeline.denoiser, **dict(zip(ENCODERS, pipeline.encoders, strict=False))}
    if pipeline.vae is not None:
        parts["vae"] = pipeline.vae
    with quiet():
        for name, part in parts.items():
            part.save_pretrained(place / name, safe_serialization=True)  # type: ignore[operator]
    for tokenizer in pipeline.folder.glob("tokenizer*") if pipeline.folder is not None else ():
        shutil.copytree(tokenizer, place / tokenizer.name, dirs_exist_ok=True)
    (place / "scheduler").mkdir(parents=True, exist_ok=True)
    schedule = {"_class_name": "DDPMScheduler", **pipeline.schedule}
    (place / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule, indent=2), encoding="utf-8")
    libraries = {name: "transformers" if name in ENCODERS else "diffusers" for name in parts}
    table = {name: [libraries[name], type(part).__name__] for name, part in parts.items()}
    content = {**index, **table, "scheduler": ["diffusers", schedule["_class_name"]]}
    (place / "model_index.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    return place


def _denoiser_name(parts: Any, where: str) -> str:
    found = [name for name in DENOISERS if name in parts]
    if len(found) != 1:
        raise ConfigError(
            f"the pipeline has {'both a unet and a transformer' if found else 'neither a unet nor a transformer'}",
            where=where,
            fix="give it one of the two: what predicts the noise",
        )
    return found[0]


def _downloaded(name: str) -> Path:
    diffusers = library("diffusers")
    try:
        return Path(diffusers.DiffusionPipeline.download(name, use_safetensors=True))
    except Exception as error:  # the hub's client raises many kinds, none of which names what a reader can do
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"there is no such folder, and the hub did not give it: {reason:.200}",
            where=f"model.path: {name}",
            fix=f"check the name, or set {PLACES} to the folder where base models lie",
        ) from None


def _digest(folder: Path) -> str:
    parts = [f"{name} {weights_digest(folder / name)}" for name in _WEIGHTED if (folder / name).is_dir()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@lru_cache(maxsize=2)
def _pristine(base_text: str) -> Pipeline:
    base = json.loads(base_text)
    try:
        with Rng(base.get("seed", 0)).ambient("base model"), warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            return (_from_folder(base) if "path" in base else _from_config(base["config"])).train()
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"the pipeline cannot be built: {reason:.200}",
            where=f"model.path: {base['path']}" if "path" in base else "model.config",
            fix="check the configuration of its parts",
        ) from None


def _from_config(config: Mapping[str, Any]) -> Pipeline:
    diffusers = library("diffusers")
    kind = _denoiser_name(config, "model.config")
    encoders = [_drawn_encoder(name, config[name]) for name in ENCODERS if name in config]
    vae = _drawn(diffusers, config["vae"], "vae", (_VAE,)) if "vae" in config else None
    pads = tuple(int(encoder.config.pad_token_id or 0) for encoder in encoders)
    denoiser = _drawn(diffusers, config[kind], kind, _KNOWN_DENOISERS)
    return Pipeline(kind, denoiser, encoders, vae, config.get("scheduler", {}), pads, ())


def _from_folder(base: Mapping[str, Any]) -> Pipeline:
    diffusers, transformers, folder = library("diffusers"), library("transformers"), pipeline_folder(base["path"])
    if _digest(folder) != base["digest"]:
        raise ModelError(
            "the pipeline here has other weights than the one that was agreed on",
            where=f"model.path: {folder}",
            fix="take the same version of the pipeline",
        )
    own: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    kind = _denoiser_name([place.name for place in folder.iterdir()], f"model.path: {folder}")
    denoiser = getattr(diffusers, _class_name(folder, kind, _KNOWN_DENOISERS)).from_pretrained(folder / kind, **own)
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae", **own) if (folder / "vae").is_dir() else None
    encoders, pads, empty = [], [], ()
    for name in [name for name in ENCODERS if (folder / name).is_dir()]:
        factory = getattr(transformers, _class_name(folder, name, tuple(_KNOWN_ENCODERS)))
        encoders.append(factory.from_pretrained(folder / name, dtype=torch.float32, **own))
        place = folder / name.replace("text_encoder", "tokenizer")
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=True) if place.is_dir() else None
        pad = encoders[-1].config.pad_token_id if tokenizer is None else tokenizer.pad_token_id
        pads.append(int(pad or 0))
        if tokenizer is not None and name == ENCODERS[0]:
            empty = tuple(tokenizer("")["input_ids"])
    schedule = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    index = folder / "model_index.json"
    facts = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    return Pipeline(
        kind, denoiser.float(), encoders, vae, schedule, tuple(pads), empty, folder, bool(facts.get(_ZEROES_EMPTY))
    )


def _class_name(folder: Path, part: str, known: tuple[str, ...]) -> str:
    config = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
    name = str(config.get("_class_name") or next(iter(config.get("architectures") or []), ""))
    return _known(name, part, known, f"model.path: {folder}")


def _known(name: str, part: str, known: tuple[str, ...], where: str) -> str:
    if name not in known:
        raise ConfigError(f"the {part} is a {name}", where=where, fix=f"those that can be used: {', '.join(known)}")
    return name


def _drawn(diffusers: Any, settings: Mapping[str, Any], part: str, known: tuple[str, ...]) -> Any:
    table = dict(settings)
    name = table.pop("_class_name", DENOISERS.get(part, known[0]))
    factory = getattr(diffusers, _known(name, part, known, f"model.config.{part}"))
    # Diffusers passes over a setting that it does not know.
    unknown = sorted(set(table) - set(inspect.signature(factory.__init__).parameters))
    if unknown:
        raise ConfigError(
            f'a {name} has no setting "{unknown[0]}"', where=f"model.config.{part}", fix="see the class in diffusers"
        )
    return factory(**table)


def _drawn_encoder(part: str, settings: Mapping[str, Any]) -> Any:
    transformers, table = library("transformers"), dict(settings)
    name = _known(table.pop("_class_name", "CLIPTextModel"), part, tuple(_KNOWN_ENCODERS), f"model.config.{part}")
    # Special tokens of CLIP's own vocabulary would be beyond a small one.
    if table.get("vocab_size", _LARGEST_VOCABULARY + 1) <= _LARGEST_VOCABULARY:
        table = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, **table}
    return getattr(transformers, name)(getattr(transformers, _KNOWN_ENCODERS[name])(**table))
