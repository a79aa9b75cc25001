"""A module that learns to draw pictures by captions, and draws them."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.core.artifact import Recipe
from fedfuse.core.errors import ConfigError
from fedfuse.core.examples import Examples
from fedfuse.core.judging import Evaluation
from fedfuse.core.seeding import Rng
from fedfuse.models.foundation.base import library, quiet
from fedfuse.models.foundation.conditioning import Condition, Reader
from fedfuse.models.foundation.foundation import Foundation
from fedfuse.models.foundation.peft_kinds import PeftSettings
from fedfuse.models.foundation.pipeline import Pipeline

_AT_ONCE = 64
_PIXELS_AT_ONCE = 1 << 20


class TextToImage(Foundation):
    """Captions to pictures.

    Inputs hold pixels in [-1, 1], channel by channel, and then the caption's tokens, below 0 where it has ended.

    Args:
        pipeline: the parts, without adapters.
        peft: which part of the denoiser is trained.
        recipe: rebuilds this module.
    """

    def __init__(self, pipeline: Pipeline, peft: PeftSettings, recipe: Recipe) -> None:
        self_size = picture_shape(pipeline, recipe["image_size_px"])
        self_reader = Reader(pipeline)
        last = getattr(pipeline.denoiser, "conv_out", None) or getattr(pipeline.denoiser, "proj_out", None)
        super().__init__(peft.apply(pipeline.denoiser, "FEATURE_EXTRACTION"), recipe)
        if peft.kind == "head" and last is not None:
            last.requires_grad_(True)
        self.reader = self_reader.requires_grad_(bool(recipe["trains_text_encoder"]))
        self.vae = None if pipeline.vae is None else pipeline.vae.requires_grad_(False)
        self.picture_shape = self_size
        self.schedule, self.folder = pipeline.schedule, pipeline.folder
        self.target = str(pipeline.schedule.get("prediction_type", "epsilon"))
        self.judge_path: str = recipe["judge"]
        self.num_drawn: int = recipe["num_drawn"]
        self._noising, self._drawing = _schedulers(pipeline)
        self.hide_base()

    def forward(self, x: Tensor) -> Tensor:
        """Draw pictures by the captions of inputs, from the same noise every time.

        Args:
            x: shape ``(n, channels * height * width + max_length)``; its pixels are not looked at.

        Returns:
            Shape ``(n, channels, height, width)``, in [0, 1].
        """
        return self.sample(self.captions_of(x), Rng(0).child("drawings"))

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """Squared error of what is predicted from noisy pictures, at random times and with some captions left out.

        Args:
            x: shape ``(n, channels * height * width + max_length)``.
            y: not used.

        Returns:
            Mean over the batch and all numbers of a picture (Ho et al., NeurIPS 2020, eq. 14).
        """
        clean, captions = self._latents(x, is_random=True), self.captions_of(x)
        is_left_out = torch.rand(len(x), device=x.device) < self.recipe["caption_dropout"]
        captions = captions.masked_fill(is_left_out[:, None], -1)
        steps = torch.randint(self._noising.config.num_train_timesteps, (len(x),), device=x.device)
        guess, truth = self._guess(clean, torch.randn_like(clean), steps, captions)
        return F.mse_loss(guess, truth)

    @torch.no_grad()
    def judge(self, examples: Examples, *, device: torch.device | str = "cpu") -> Evaluation:
        """How well it predicts noise that is the same every time, over all times evenly.

        Args:
            examples: at least one.
            device: where.

        Returns:
            The squared error as loss; as accuracy the share of the mean square of what is to be predicted that the
            prediction explains, at least 0. Scores of drawings are another matter: they need a judge.
        """
        num_steps, rng = self._noising.config.num_train_timesteps, Rng(0).child("judged noise")
        order = torch.randperm(len(examples), generator=rng.torch("times"))
        steps = ((order + 0.5) / len(examples) * num_steps).long()
        draw = rng.torch("noise")
        sum_errors, sum_squares, num_numbers = 0.0, 0.0, 0
        for part, times in zip(examples.x.split(self._at_once), steps.split(self._at_once), strict=True):
            x = part.to(device)
            clean = self._latents(x, is_random=False)
            noise = torch.randn(clean.shape, generator=draw).to(device)
            guess, truth = self._guess(clean, noise, times.to(device), self.captions_of(x))
            sum_errors += float((guess - truth).double().square().sum())
            sum_squares += float(truth.double().square().sum())
            num_numbers += truth.numel()
        loss = sum_errors / num_numbers
        explained = max(0.0, 1 - sum_errors / sum_squares)
        return Evaluation(explained, loss, metrics={"denoising_loss": loss, "noise_explained": explained})

    @torch.no_grad()
    def sample(
        self,
        captions: Tensor,
        rng: Rng,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Tensor:
        """Draw a picture for each caption, by DDIM without new noise, guided away from the empty caption.

        Args:
            captions: tokens, shape ``(n, length)``; below 0 is padding.
            rng: the first noise is drawn from it, on the CPU, for all pictures in order.
            num_inference_steps: instead of the recipe's.
            guidance_scale: instead of the recipe's.

        Returns:
            Shape ``(n, channels, height, width)``, in [0, 1], where the model is.
        """
        was_training, device = self.training, next(self.parameters()).device
        self.eval()
        noise = torch.randn((len(captions), *self._latent_shape), generator=rng.torch("first noise"))
        scale = self.recipe["guidance_scale"] if guidance_scale is None else guidance_scale
        parts = []
        for own, start in zip(captions.split(self._at_once), noise.split(self._at_once), strict=True):
            asked = self.reader(own.to(device))
            free = self.reader(torch.full_like(own, -1).to(device)) if scale != 1 else None
            self._drawing.set_timesteps(num_inference_steps or self.recipe["num_inference_steps"], device=device)
            picture = start.to(device)
            for step in self._drawing.timesteps:
                steps = step.expand(len(own))
                guess = self._denoised(picture, steps, asked)
                if free is not None:
                    unguided = self._denoised(picture, steps, free)
                    guess = unguided + scale * (guess - unguided)
                picture = self._drawing.step(guess, step, picture).prev_sample
            parts.append(self._pictures(picture))
        self.train(was_training)
        return torch.cat(parts) if parts else torch.empty(0, *self.picture_shape, device=device)

    def draw(self, x: Tensor, rng: Rng) -> Tensor:
        """Draw pictures by the captions of inputs.

        Args:
            x: shape ``(n, channels * height * width + max_length)``; its pixels are not looked at.
            rng: the first noise is drawn from it.

        Returns:
            Shape ``(n, channels, height, width)``, in [0, 1].
        """
        return self.sample(self.captions_of(x), rng)

    def captions_of(self, x: Tensor) -> Tensor:
        """The captions of inputs.

        Args:
            x: shape ``(n, channels * height * width + max_length)``.

        Returns:
            Tokens, shape ``(n, max_length)``.
        """
        return x[:, self._num_pixels :]

    def pictures_of(self, x: Tensor) -> Tensor:
        """The pictures of inputs.

        Args:
            x: shape ``(n, channels * height * width + max_length)``.

        Returns:
            Shape ``(n, channels, height, width)``, in [0, 1].
        """
        return (x[:, : self._num_pixels].reshape(-1, *self.picture_shape) + 1) / 2

    def pipeline(self) -> Pipeline:
        """The whole pipeline as it is now, adapters merged into the weights; ``save_pipeline`` writes it to a folder.

        Returns:
            Parts that share nothing with this module.
        """
        net, reader = copy.deepcopy(self.net), copy.deepcopy(self.reader)
        merge = getattr(net, "merge_and_unload", None)
        return Pipeline(
            "transformer" if reader.is_transformer else "unet",
            net if merge is None else merge(),
            list(reader.encoders),
            copy.deepcopy(self.vae),
            self.schedule,
            reader.pad_ids,
            reader.empty_ids,
            self.folder,
            reader.zeroes_empty,
        )

    @property
    def _at_once(self) -> int:
        """Pictures that are drawn or judged together: few where they are large."""
        return max(1, min(_AT_ONCE, _PIXELS_AT_ONCE // (self.picture_shape[1] * self.picture_shape[2])))

    @property
    def _num_pixels(self) -> int:
        channels, height, width = self.picture_shape
        return channels * height * width

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        if self.vae is None:
            return self.picture_shape
        side = self.picture_shape[1] // _shrinking(self.vae)
        return int(self.vae.config.latent_channels), side, side  # type: ignore[union-attr, arg-type]

    def _latents(self, x: Tensor, *, is_random: bool) -> Tensor:
        """What noise is added to: pixels in [-1, 1], or the encoding of the autoencoder."""
        pixels = x[:, : self._num_pixels].reshape(-1, *self.picture_shape)
        if self.vae is None:
            return pixels
        with torch.no_grad():
            found = self.vae.encode(pixels).latent_dist  # type: ignore[operator]
            latents = found.sample() if is_random else found.mode()
            return latents * self.vae.config.scaling_factor  # type: ignore[no-any-return, union-attr]

    def _pictures(self, latents: Tensor) -> Tensor:
        if self.vae is not None:
            latents = self.vae.decode(latents / self.vae.config.scaling_factor).sample  # type: ignore[operator, union-attr]
        return ((latents.float() + 1) / 2).clamp(0, 1)

    def _guess(self, clean: Tensor, noise: Tensor, steps: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        """What is predicted from noisy pictures, and what should be."""
        noisy = self._noising.add_noise(clean, noise, steps)
        guess = self._denoised(noisy, steps, self.reader(captions))
        if self.target == "v_prediction":
            return guess, self._noising.get_velocity(clean, noise, steps)
        return guess, noise if self.target == "epsilon" else clean

    def _denoised(self, noisy: Tensor, steps: Tensor, condition: Condition) -> Tensor:
        guess: Tensor = self.net(
            noisy, timestep=steps, return_dict=False, **condition.arguments(self.picture_shape[1], len(noisy))
        )[0]
        # Some transformers also predict a variance, which is not learnt here.
        return guess[:, : noisy.shape[1]].float()


def picture_shape(pipeline: Pipeline, side_px: int | None = None) -> tuple[int, int, int]:
    """Channels, height and width of the pictures that a pipeline draws.

    Args:
        pipeline: its parts.
        side_px: height and width; the pipeline's own if left out.

    Raises:
        ConfigError: a side does not fit, or the pipeline does not say its own.
    """
    config: Any = pipeline.denoiser.config
    shrinking = 1 if pipeline.vae is None else _shrinking(pipeline.vae)
    if side_px is None:
        if not isinstance(config.sample_size, int):
            raise ConfigError(
                "the pipeline does not say how large its pictures are",
                where="model.image_size_px",
                fix="give the side in pixels",
            )
        side_px = config.sample_size * shrinking
    if side_px < 1 or side_px % shrinking:
        raise ConfigError(
            f"pictures of {side_px} pixels cannot be shrunk {shrinking} times",
            where="model.image_size_px",
            fix=f"give a multiple of {shrinking}",
        )
    channels = config.in_channels if pipeline.vae is None else pipeline.vae.config.in_channels  # type: ignore[union-attr]
    return int(channels), side_px, side_px  # type: ignore[arg-type]


def _shrinking(vae: nn.Module) -> int:
    """Pixels per latent, along a side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)  # type: ignore[no-any-return, union-attr, arg-type]


def _schedulers(pipeline: Pipeline) -> tuple[Any, Any]:
    """What adds noise in training, and what takes it away in drawing."""
    diffusers = library("diffusers")
    settings = {name: value for name, value in pipeline.schedule.items() if not name.startswith("_")}
    if pipeline.vae is not None:
        # Latents are not bounded as pixels are.
        settings.setdefault("clip_sample", False)
    with quiet():
        schedulers = []
        for factory in (diffusers.DDPMScheduler, diffusers.DDIMScheduler):
            known = inspect.signature(factory.__init__).parameters
            schedulers.append(factory(**{name: value for name, value in settings.items() if name in known}))
    return schedulers[0], schedulers[1]
