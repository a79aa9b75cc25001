"""Mixing images by the amplitudes of their Fourier transforms, and cutting parts out of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def mix_amplitudes(images: Tensor, others: Tensor, weight: float) -> Tensor:
    """Give images a part of other images' amplitude spectrum; the phases, which hold most of the shapes, stay.

    Fourier data augmentation, Xu et al., CVPR 2021, equations 3 to 5; FedSD2C, Zhang, Liu and Wang, NeurIPS 2024.

    Args:
        images: shape ``(n, channels, height, width)``.
        others: of the same shape.
        weight: of the others' amplitudes, in [0, 1]; 0 leaves the images as they are.

    Returns:
        The same shape; pixels may leave their range.
    """
    own, other = torch.fft.rfft2(images.float()), torch.fft.rfft2(others.float())
    amplitude = (1 - weight) * own.abs() + weight * other.abs()
    mixed: Tensor = torch.fft.irfft2(torch.polar(amplitude, own.angle()), s=images.shape[-2:])
    return mixed.to(images.dtype)


def random_boxes(num_boxes: int, smallest_area: float, generator: torch.Generator) -> Tensor:
    """Boxes inside of an image: a random part of its area, a random shape, a random place.

    Args:
        num_boxes: how many.
        smallest_area: least part of the image's area, in (0, 1]; 1 is the whole image.
        generator: decides the boxes; on the CPU.

    Returns:
        Centre x, centre y, half width and half height, in units of half the image's sides around its centre: shape
        ``(num_boxes, 4)``. Sides differ by a factor of at most 4 / 3.
    """
    draws = torch.rand(4, num_boxes, generator=generator)
    area = smallest_area + (1 - smallest_area) * draws[0]
    ratio = torch.exp((2 * draws[1] - 1) * math.log(4 / 3) / 2)
    half_width, half_height = (area.sqrt() * ratio).clamp(max=1), (area.sqrt() / ratio).clamp(max=1)
    x, y = (2 * draws[2] - 1) * (1 - half_width), (2 * draws[3] - 1) * (1 - half_height)
    return torch.stack([x, y, half_width, half_height], 1)


def cut_boxes(images: Tensor, boxes: Tensor) -> Tensor:
    """Cut one box out of each image and bring it to the image's size.

    Args:
        images: shape ``(n, channels, height, width)``.
        boxes: as :func:`random_boxes` gives them, shape ``(n, 4)``.

    Returns:
        The same shape as the images, bilinear between pixels.
    """
    x, y, half_width, half_height = boxes.to(images).unbind(1)
    zero = torch.zeros_like(x)
    maps = torch.stack([torch.stack([half_width, zero, x], 1), torch.stack([zero, half_height, y], 1)], 1)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
