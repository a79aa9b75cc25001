"""Augmentations of whole batches of images, each image with its own random choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from fedfuse.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from fedfuse.data.dataset import Dataset

CROP_PADDING = 4
"""Pixels that are added at each side before a crop."""

_SMALLEST_SIDE = 24


def default_augment(dataset: Dataset) -> str:
    """What ``auto`` means for a data set.

    Args:
        dataset: decides by its inputs only.

    Returns:
        ``crop_flip`` for colour images with sides of at least 24 pixels, else ``none``: a mirrored digit is another
        sign, and 4 pixels are much of a small image.
    """
    shape = dataset.input_shape
    is_photo = dataset.is_image and len(shape) == 3 and shape[0] == 3 and min(shape[1:]) >= _SMALLEST_SIDE
    return "crop_flip" if is_photo else "none"


def check_augment(name: str) -> None:
    """Refuse a name that is no augmentation.

    Args:
        name: ``none``, ``crop``, ``flip`` or ``crop_flip``.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in AUGMENTATIONS:
        raise ConfigError(
            f'there is no augmentation "{name}"', where="augment", fix=did_you_mean(name, [*AUGMENTATIONS, "auto"])
        )


def augment_batch(name: str, x: Tensor, generator: torch.Generator) -> Tensor:
    """Augment a batch.

    Args:
        name: ``none``, ``crop``, ``flip`` or ``crop_flip``.
        x: images, shape ``(n, channels, height, width)``; left as they are. ``none`` takes any shape.
        generator: where the choices are drawn from; on its own device.

    Returns:
        The same shape; ``x`` itself for ``none``.

    Raises:
        ConfigError: there is no such augmentation, or ``x`` are no images.
    """
    check_augment(name)
    if name != "none" and x.dim() != 4:
        raise ConfigError(
            f'the augmentation "{name}" is for images, not for inputs of shape {tuple(x.shape[1:])}',
            where="augment",
            fix="set augment to none",
        )
    return AUGMENTATIONS[name](x, generator)


def _none(x: Tensor, generator: torch.Generator) -> Tensor:
    return x


def _flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability one half."""
    is_flipped = torch.rand(len(x), generator=generator, device=generator.device) < 0.5
    return torch.where(is_flipped.to(x.device)[:, None, None, None], x.flip(3), x)


def _crop(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pad with zeros (the mean, after normalisation) and cut the old size out at a random place."""
    n, _, height, width = x.shape
    offsets = torch.randint(0, 2 * CROP_PADDING + 1, (2, n), generator=generator, device=generator.device).to(x.device)
    padded = functional.pad(x, (CROP_PADDING,) * 4)
    rows = offsets[0][:, None] + torch.arange(height, device=x.device)
    columns = offsets[1][:, None] + torch.arange(width, device=x.device)
    # One gather per axis: indices are views that repeat along the other axes, so they cost no memory.
    cut = padded.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, padded.shape[3]))
    return cut.gather(3, columns[:, None, None, :].expand(-1, x.shape[1], height, -1))


def _crop_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    return _flip(_crop(x, generator), generator)


AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "none": _none,
    "crop": _crop,
    "flip": _flip,
    "crop_flip": _crop_flip,
}
"""Augmentations by name."""
