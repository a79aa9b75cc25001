"""Text-to-image diffusion models of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fedfuse.core.artifact import ModelSpec, load
from fedfuse.core.errors import ConfigError, FedfuseError
from fedfuse.core.registry import register_model, register_recipe
from fedfuse.core.settings import from_json, to_json
from fedfuse.models.foundation.conditioning import Reader
from fedfuse.models.foundation.peft_kinds import PeftSettings
from fedfuse.models.foundation.pipeline import Pipeline, load_pipeline, pipeline_base
from fedfuse.models.foundation.text_to_image import TextToImage, picture_shape

_TARGETS = ("epsilon", "v_prediction", "sample")
_VIRTUAL_TOKENS = ("prompt", "prefix")


@register_model("diffusers")
@dataclass(frozen=True, kw_only=True)
class Diffusers:
    """A text-to-image pipeline of diffusers: a UNet or a diffusion transformer, trained whole or in part.

    Inputs are pixels and caption tokens, as the source ``captioned`` makes them. Without a ``vae`` it works on pixels.

    Args:
        path: folder of a pipeline, or a name on the hub (Stable Diffusion 1 and 2, SDXL, PixArt); left out, weights
            are drawn.
        config: configurations of the parts where there is no path: ``unet`` or ``transformer``, ``text_encoder``,
            ``scheduler``, and perhaps ``text_encoder_2`` and ``vae``, as diffusers and transformers name settings.
        peft: which part of the network that predicts the noise is trained.
        image_size_px: side of a picture; that of the pipeline if left out.
        caption_dropout: share of captions that training leaves out, in [0, 1), so that guidance has something to
            compare with (Ho and Salimans, 2022).
        trains_text_encoder: whether all of it is trained too.
        num_inference_steps: steps of a drawing by DDIM (Song et al., ICLR 2021), at least 1.
        guidance_scale: how far a drawing is pushed towards its caption; 1 is not at all.
        num_drawn: pictures that are drawn for scores and for the report when it is judged; 0 is none.
        judge: folder of a run or of an artifact: a classifier of such pictures, trained on training data, by whose
            answers and features drawings are scored; ``None`` scores none.
    """

    path: str | None = None
    config: dict[str, dict[str, Any]] = field(default_factory=dict)
    peft: PeftSettings = field(default_factory=PeftSettings)
    image_size_px: int | None = None
    caption_dropout: float = 0.1
    trains_text_encoder: bool = False
    num_inference_steps: int = 50
    guidance_scale: float = 3.0
    num_drawn: int = 0
    judge: str | None = None

    def __post_init__(self) -> None:
        for name, least in {"num_inference_steps": 1, "guidance_scale": 1, "num_drawn": 0}.items():
            if getattr(self, name) < least:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}", where=f"model.{name}", fix=f"give at least {least}"
                )
        if not 0 <= self.caption_dropout < 1:
            raise ConfigError(
                f"caption_dropout is {self.caption_dropout:g}",
                where="model.caption_dropout",
                fix="give a number in [0, 1)",
            )
        if self.peft.kind in _VIRTUAL_TOKENS:
            raise ConfigError(
                "a text-to-image model has no place for virtual tokens", where="model.peft.kind", fix="use kind: lora"
            )

    def spec(self, input_shape: tuple[int, ...], num_classes: int, seed: int) -> ModelSpec:
        """The specification of the model.

        Args:
            input_shape: ``(channels * height * width + max_length,)``.
            num_classes: number of classes.
            seed: adapters and, without a path, all weights are drawn from it.

        Raises:
            ConfigError: a setting cannot be, or inputs do not fit the pipeline.
            ModelError: the pipeline cannot be built.
        """
        recipe: dict[str, Any] = {
            "kind": "diffusers",
            "base": pipeline_base(self.path, self.config, seed),
            "peft": to_json(self.peft),
            "image_size_px": self.image_size_px,
            "caption_dropout": self.caption_dropout,
            "trains_text_encoder": self.trains_text_encoder,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "num_drawn": self.num_drawn,
            "judge": self.judge or "",
        }
        pipeline = load_pipeline(recipe["base"])
        if len(input_shape) != 1:
            raise ConfigError(
                f"inputs of shape {tuple(input_shape)} are no pictures with captions",
                where="model.family",
                fix="use source: captioned",
            )
        self._check(pipeline, input_shape[0])
        if self.judge is not None:
            check_judge(self.judge, picture_shape(pipeline, self.image_size_px), num_classes)
        return ModelSpec(recipe=recipe, seed=seed, input_shape=tuple(input_shape), num_classes=num_classes)

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Build the model.

        Args:
            input_shape: see :meth:`spec`.
            num_classes: number of classes.
        """
        return self.spec(input_shape, num_classes, 0).build()

    def _check(self, pipeline: Pipeline, width: int) -> None:
        shape = picture_shape(pipeline, self.image_size_px)
        num_pixels, longest = shape[0] * shape[1] * shape[2], Reader(pipeline).longest
        if not 0 < width - num_pixels <= longest:
            raise ConfigError(
                f"inputs of {width} numbers are no pictures of {' x '.join(map(str, shape))} with captions of "
                f"1 to {longest} tokens",
                where="data",
                fix=f"set data.size to {shape[1]}, channels to {shape[0]} and max_length to {longest} or less",
            )
        target = pipeline.schedule.get("prediction_type", "epsilon")
        if target not in _TARGETS or "FlowMatch" in str(pipeline.schedule.get("_class_name", "")):
            raise ConfigError(
                f"the pipeline predicts {'a flow' if target in _TARGETS else target}",
                where="model",
                fix=f"use one that predicts one of: {', '.join(_TARGETS)}",
            )
        self.peft.check_rank(pipeline.denoiser)


@register_recipe("diffusers")
def build_diffusers(recipe: Mapping[str, Any]) -> nn.Module:
    """Build a text-to-image model; new parts are drawn from torch's generator.

    Args:
        recipe: as :meth:`Diffusers.spec` writes it.

    Returns:
        The model.
    """
    return TextToImage(
        load_pipeline(recipe["base"]), from_json(PeftSettings, recipe["peft"], where="model.peft"), recipe
    )


def check_judge(path: str, shape: tuple[int, int, int], num_classes: int) -> None:
    """Refuse a judge that could not score a single drawing, before anybody trains.

    Args:
        path: folder of a run or of an artifact.
        shape: of a picture.
        num_classes: number of classes of the data.

    Raises:
        ConfigError: it is not there, does not take such pictures, or names other classes.
    """
    where, fix = f"model.judge: {path}", "name the folder of a run that trained a classifier of such pictures"
    try:
        with torch.no_grad():
            answer = load(path)(torch.zeros(1, *shape))
    except FedfuseError as error:
        raise ConfigError(f"the judge cannot be used: {error.what}", where=where, fix=fix) from None
    except RuntimeError:
        size = " x ".join(map(str, shape))
        raise ConfigError(f"the judge does not take pictures of {size}", where=where, fix=fix) from None
    if tuple(answer.shape) != (1, num_classes):
        raise ConfigError(
            f"the judge answers in shape {tuple(answer.shape[1:])}, and there are {num_classes} classes",
            where=where,
            fix=fix,
        )
