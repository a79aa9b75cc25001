"""Encoders and decoders of images and vectors: autoencoders, and conditional variational ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.core.errors import ModelError
from fedfuse.core.registry import register_recipe


class Encoder(nn.Module):
    """Inputs to vectors: two strided convolutions for images, two hidden layers for vectors.

    Without normalisation layers: what is encoded does not depend on the batch.

    Args:
        input_shape: ``(channels, height, width)`` or ``(num_features,)``.
        num_outputs: length of the vector.
        width: channels of the first convolution, or half the units of the hidden layers.
        num_extra: length of a vector that is seen beside the input.

    Raises:
        ModelError: inputs of that shape cannot be encoded.
    """

    def __init__(self, input_shape: tuple[int, ...], *, num_outputs: int, width: int, num_extra: int = 0) -> None:
        super().__init__()
        _check_shape(input_shape)
        if len(input_shape) == 3:
            self.body = nn.Sequential(
                nn.Conv2d(input_shape[0], width, 3, stride=2, padding=1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
                nn.LeakyReLU(0.2),
                nn.Flatten(),
            )
            num_features = 2 * width * math.prod(_quarter(input_shape))
        else:
            self.body = nn.Sequential(nn.Linear(input_shape[0], 2 * width), nn.LeakyReLU(0.2))
            num_features = 2 * width
        self.last = nn.Sequential(
            nn.Linear(num_features + num_extra, 4 * width), nn.LeakyReLU(0.2), nn.Linear(4 * width, num_outputs)
        )

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        """Encode.

        Args:
            x: shape ``(n, *input_shape)``.
            extra: shape ``(n, num_extra)``.

        Returns:
            Shape ``(n, num_outputs)``.
        """
        features = self.body(x)
        encoded: Tensor = self.last(features if extra is None else torch.cat([features, extra], 1))
        return encoded


class Decoder(nn.Module):
    """Vectors to inputs: a linear layer and two upsampled convolutions for images, two hidden layers for vectors.

    Args:
        input_shape: of what is decoded.
        num_inputs: length of the vector.
        width: as the encoder's.

    Raises:
        ModelError: inputs of that shape cannot be decoded.
    """

    def __init__(self, input_shape: tuple[int, ...], *, num_inputs: int, width: int) -> None:
        super().__init__()
        _check_shape(input_shape)
        self.input_shape = tuple(input_shape)
        self.small: tuple[int, ...] = (2 * width,)
        if len(input_shape) == 3:
            # Sides that 4 does not divide are made too large and cut.
            self.small = (2 * width, *_quarter(input_shape))
            self.body = nn.Sequential(
                nn.LeakyReLU(0.2),
                nn.Upsample(scale_factor=2),
                nn.Conv2d(2 * width, width, 3, padding=1),
                nn.LeakyReLU(0.2),
                nn.Upsample(scale_factor=2),
                nn.Conv2d(width, width, 3, padding=1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(width, input_shape[0], 3, padding=1),
            )
        else:
            self.body = nn.Sequential(
                nn.LeakyReLU(0.2),
                nn.Linear(2 * width, 2 * width),
                nn.LeakyReLU(0.2),
                nn.Linear(2 * width, input_shape[0]),
            )
        self.first = nn.Linear(num_inputs, math.prod(self.small))

    def forward(self, code: Tensor) -> Tensor:
        """Decode.

        Args:
            code: shape ``(n, num_inputs)``.

        Returns:
            Shape ``(n, *input_shape)``, of any range.
        """
        decoded: Tensor = self.body(self.first(code).view(-1, *self.small))
        return decoded[..., : self.input_shape[-2], : self.input_shape[-1]] if decoded.ndim == 4 else decoded


class ConditionalDecoder(nn.Module):
    """The decoder of a conditional variational autoencoder: latent vectors and classes to raw inputs.

    Args:
        input_shape: of what is decoded.
        num_classes: number of classes.
        latent_size: length of a latent vector.
        width: of the network.
        is_pixels: whether raw inputs are in [0, 1].
    """

    def __init__(
        self, input_shape: tuple[int, ...], *, num_classes: int, latent_size: int, width: int, is_pixels: bool
    ) -> None:
        super().__init__()
        self.num_classes, self.latent_size, self.is_pixels = num_classes, latent_size, is_pixels
        self.net = Decoder(input_shape, num_inputs=latent_size + num_classes, width=width)

    def parameters_of(self, latent: Tensor, labels: Tensor) -> Tensor:
        """What the likelihood of inputs is made of.

        Args:
            latent: shape ``(n, latent_size)``.
            labels: shape ``(n,)``.

        Returns:
            Logits of pixels, or means, shape ``(n, *input_shape)``.
        """
        decoded: Tensor = self.net(torch.cat([latent, F.one_hot(labels, self.num_classes).float()], 1))
        return decoded

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:
        """Make inputs.

        Args:
            latent: shape ``(n, latent_size)``.
            labels: shape ``(n,)``.

        Returns:
            Raw inputs, shape ``(n, *input_shape)``.
        """
        decoded = self.parameters_of(latent, labels)
        return decoded.sigmoid() if self.is_pixels else decoded


class ConditionalEncoder(nn.Module):
    """The encoder of a conditional variational autoencoder: inputs and classes to Gaussians over latent vectors.

    Args:
        input_shape: of one input.
        num_classes: number of classes.
        latent_size: length of a latent vector.
        width: of the network.
    """

    def __init__(self, input_shape: tuple[int, ...], *, num_classes: int, latent_size: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.net = Encoder(input_shape, num_outputs=2 * latent_size, width=width, num_extra=num_classes)

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode.

        Args:
            x: raw inputs, shape ``(n, *input_shape)``.
            labels: shape ``(n,)``.

        Returns:
            Means and logarithms of variances, each of shape ``(n, latent_size)``.
        """
        mean, log_variance = self.net(x, F.one_hot(labels, self.num_classes).float()).chunk(2, 1)
        return mean, log_variance


class Autoencoder(nn.Module):
    """An encoder and a decoder of raw inputs.

    Any module with ``encode`` and ``decode`` may stand where this does.

    Args:
        input_shape: of one input.
        latent_size: length of a latent vector.
        width: of the networks.
        is_pixels: whether raw inputs are in [0, 1].
    """

    def __init__(self, input_shape: tuple[int, ...], *, latent_size: int, width: int, is_pixels: bool) -> None:
        super().__init__()
        self.input_shape, self.latent_size, self.width = tuple(input_shape), latent_size, width
        self.is_pixels = is_pixels
        self.encoder = Encoder(input_shape, num_outputs=latent_size, width=width)
        self.decoder = Decoder(input_shape, num_inputs=latent_size, width=width)

    def encode(self, x: Tensor) -> Tensor:
        """Inputs to latent vectors.

        Args:
            x: raw, shape ``(n, *input_shape)``.

        Returns:
            Shape ``(n, latent_size)``.
        """
        code: Tensor = self.encoder(x)
        return code

    def decode(self, code: Tensor) -> Tensor:
        """Latent vectors to inputs.

        Args:
            code: shape ``(n, latent_size)``.

        Returns:
            Raw inputs, shape ``(n, *input_shape)``.
        """
        decoded: Tensor = self.decoder(code)
        return decoded.sigmoid() if self.is_pixels else decoded

    def forward(self, x: Tensor) -> Tensor:
        """There and back.

        Args:
            x: raw, shape ``(n, *input_shape)``.

        Returns:
            The same shape.
        """
        return self.decode(self.encode(x))

    @property
    def recipe(self) -> dict[str, Any]:
        """What rebuilds it."""
        facts = {"latent_size": self.latent_size, "width": self.width, "is_pixels": self.is_pixels}
        return {"kind": "autoencoder", "input_shape": list(self.input_shape), **facts}


@register_recipe("autoencoder")
def build_autoencoder(recipe: Mapping[str, Any]) -> Autoencoder:
    """Build an autoencoder.

    Args:
        recipe: what :attr:`Autoencoder.recipe` gave.

    Returns:
        The module with fresh weights.
    """
    return Autoencoder(
        tuple(recipe["input_shape"]),
        latent_size=int(recipe["latent_size"]),
        width=int(recipe["width"]),
        is_pixels=bool(recipe["is_pixels"]),
    )


def _quarter(input_shape: tuple[int, ...]) -> tuple[int, int]:
    return math.ceil(input_shape[1] / 4), math.ceil(input_shape[2] / 4)


def _check_shape(input_shape: tuple[int, ...]) -> None:
    if len(input_shape) not in (1, 3):
        raise ModelError(
            f"inputs of shape {tuple(input_shape)} cannot be encoded and decoded",
            where="model",
            fix="use a method that sends no images or decoders, such as ensemble or fusefl",
        )
