"""Networks that make inputs from noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.core.errors import ModelError


class Generator(nn.Module):
    """Makes images, or vectors, from latent vectors.

    Images: a linear layer to maps of a quarter of the size, then twice an upsampling and a 3x3 convolution, as the
    generator of DAFL (Chen et al., ICCV 2019) that most data-free methods use. Sides that 4 does not divide are cut
    to size. Vectors: two hidden layers.

    Args:
        input_shape: ``(channels, height, width)`` or ``(num_features,)``.
        latent_size: length of a latent vector.
        width: channels of the first maps, or half the units of the hidden layers.
        is_pixels: end in a sigmoid, for values in [0, 1]; else in a BatchNorm layer, for inputs of unknown range.

    Raises:
        ModelError: inputs of that shape cannot be made.
    """

    def __init__(self, input_shape: tuple[int, ...], *, latent_size: int, width: int, is_pixels: bool) -> None:
        super().__init__()
        self.input_shape, self.latent_size = tuple(input_shape), latent_size
        last: nn.Module
        self.small: tuple[int, ...]
        if len(input_shape) == 3:
            channels, height, side = input_shape
            self.small = (width, math.ceil(height / 4), math.ceil(side / 4))
            half = max(1, width // 2)
            last = nn.Sigmoid() if is_pixels else nn.BatchNorm2d(channels)
            self.first = nn.Linear(latent_size, math.prod(self.small))
            self.body = nn.Sequential(
                nn.BatchNorm2d(width),
                nn.Upsample(scale_factor=2),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.LeakyReLU(0.2),
                nn.Upsample(scale_factor=2),
                nn.Conv2d(width, half, 3, padding=1, bias=False),
                nn.BatchNorm2d(half),
                nn.LeakyReLU(0.2),
                nn.Conv2d(half, channels, 3, padding=1),
                last,
            )
        elif len(input_shape) == 1:
            last = nn.Sigmoid() if is_pixels else nn.BatchNorm1d(input_shape[0])
            self.small = (2 * width,)
            self.first = nn.Linear(latent_size, 2 * width)
            self.body = nn.Sequential(
                nn.BatchNorm1d(2 * width),
                nn.LeakyReLU(0.2),
                nn.Linear(2 * width, 2 * width),
                nn.BatchNorm1d(2 * width),
                nn.LeakyReLU(0.2),
                nn.Linear(2 * width, input_shape[0]),
                last,
            )
        else:
            raise ModelError(
                f"inputs of shape {tuple(input_shape)} cannot be made from noise",
                where="model",
                fix="use a method that makes no inputs, such as feddf with server data, or fusefl",
            )

    def forward(self, latent: Tensor) -> Tensor:
        """Make inputs.

        Args:
            latent: shape ``(n, latent_size)``.

        Returns:
            Raw inputs, shape ``(n, *input_shape)``.
        """
        maps = self.first(latent).view(-1, *self.small)
        if maps.ndim == 4:
            maps = maps.contiguous(memory_format=torch.channels_last)
        made: Tensor = self.body(maps)
        return made[..., : self.input_shape[-2], : self.input_shape[-1]] if made.ndim == 4 else made

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Start anew: weights from N(0, 0.02), BatchNorm scales from N(1, 0.02), biases 0.

        Args:
            generator: decides the weights; on the CPU.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d)):
                is_norm = isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))
                drawn = torch.randn(module.weight.shape, generator=generator) * 0.02
                module.weight.copy_(drawn + 1 if is_norm else drawn)
                if module.bias is not None:
                    module.bias.zero_()
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.reset_running_stats()


class Pixels(nn.Module):
    """Inputs that are optimised themselves, without a network that makes them.

    Args:
        num_examples: how many.
        input_shape: of one.
        is_pixels: keep values in [0, 1], by a sigmoid; else they are free.
    """

    def __init__(self, num_examples: int, input_shape: tuple[int, ...], *, is_pixels: bool) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(num_examples, *input_shape))
        self.is_pixels = is_pixels

    def forward(self, latent: Tensor) -> Tensor:
        """The inputs as they are now.

        Args:
            latent: not used; so that this stands where a generator does.

        Returns:
            Raw inputs, shape ``(num_examples, *input_shape)``.
        """
        return F.sigmoid(self.values) if self.is_pixels else self.values * 1.0

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Start anew from standard normal noise.

        Args:
            generator: decides the noise; on the CPU.
        """
        self.values.copy_(torch.randn(self.values.shape, generator=generator))
