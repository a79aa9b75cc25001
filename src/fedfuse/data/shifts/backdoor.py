"""Coloured shapes whose type gives the label away: a spurious feature that a model may lean on.

Following the backdoor experiment of FuseFL (https://openreview.net/forum?id=E7fZOoiEKl): labels stay correct; some
clients train on stamped images, and the test set is clean, or stamped with shapes of random types. It measures
reliance on a spurious feature; it is no targeted attack.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError, DataError

NUM_SHAPES = 10
"""Types of shapes, so at most as many classes."""

_SMALLEST_SIZE = 7


def shape_masks(size: int) -> Tensor:
    """Ten shapes as masks: square, disc, two triangles, diamond, plus, cross, ring, frame and a half-disc.

    Args:
        size: side in pixels, at least 7, so that all shapes differ.

    Returns:
        bool, shape ``(10, size, size)``.

    Raises:
        ConfigError: the size is too small.
    """
    if size < _SMALLEST_SIZE:
        raise ConfigError(
            f"size must be at least {_SMALLEST_SIZE}, not {size}",
            where="size",
            fix="smaller shapes cannot be told apart",
        )
    centre = (size - 1) / 2
    down, right = torch.meshgrid(torch.arange(size) - centre, torch.arange(size) - centre, indexing="ij")
    radius, thickness = size / 2, max(1.0, size / 8)
    distance = torch.sqrt(down**2 + right**2)
    largest = torch.maximum(down.abs(), right.abs())
    smallest = torch.minimum(down.abs(), right.abs())
    disc = distance <= radius
    return torch.stack(
        [
            torch.ones(size, size, dtype=torch.bool),
            disc,
            right.abs() <= (down + radius) / 2,
            right.abs() <= (radius - down) / 2,
            down.abs() + right.abs() <= radius,
            smallest <= thickness,
            torch.minimum((down - right).abs(), (down + right).abs()) <= thickness,
            disc & (distance > radius - 1.5 * thickness),
            largest > radius - 1.5 * thickness,
            disc & (right <= 0),
        ]
    )


def stamp_shapes(
    x: Tensor, labels: Tensor, *, generator: torch.Generator, size: int = 10, num_shapes: int = NUM_SHAPES
) -> Tensor:
    """Stamp onto each image one shape of the type of its label, at a random place in a random colour.

    Stamp before normalising. For a test set with misleading shapes give random types instead of labels.

    Args:
        x: images in [0, 1], shape ``(n, channels, height, width)``; left as they are.
        labels: type of each shape, in [0, num_shapes), shape ``(n,)``.
        generator: where places and colours are drawn from; on its own device.
        size: side of the shapes in pixels, from 7 to the images' smaller side.
        num_shapes: types in use, from 1 to 10.

    Returns:
        Stamped images, a new tensor of the same shape.

    Raises:
        ConfigError: the size or the number of types cannot be used.
        DataError: the inputs are no images, or a label has no shape.

    Example:
        >>> x = torch.zeros(2, 3, 16, 16)
        >>> stamped = stamp_shapes(x, torch.tensor([0, 1]), generator=torch.Generator().manual_seed(0), size=8)
        >>> int((stamped[0].sum(0) > 0).sum())
        64
    """
    if x.dim() != 4:
        raise DataError(
            f"shapes are stamped onto images, not onto inputs of shape {tuple(x.shape[1:])}",
            fix="give shape (n, channels, height, width)",
        )
    if not 1 <= num_shapes <= NUM_SHAPES:
        raise ConfigError(
            f"num_shapes must be from 1 to {NUM_SHAPES}, not {num_shapes}",
            where="num_shapes",
            fix="there are ten types of shapes",
        )
    n, channels, height, width = x.shape
    if size > min(height, width):
        raise ConfigError(
            f"a shape of {size} pixels does not fit into images of {height} x {width}",
            where="size",
            fix=f"set size to {min(height, width)} or less",
        )
    if len(labels) != n:
        raise DataError(f"{n} images came with {len(labels)} labels", fix="give one label per image")
    if n and (int(labels.min()) < 0 or int(labels.max()) >= num_shapes):
        raise DataError(
            f"labels go from {int(labels.min())} to {int(labels.max())}, but there are {num_shapes} shapes",
            fix="use a task with at most ten classes",
        )
    device = generator.device
    tops = torch.randint(0, height - size + 1, (n,), generator=generator, device=device).to(x.device)
    lefts = torch.randint(0, width - size + 1, (n,), generator=generator, device=device).to(x.device)
    colours = torch.rand((n, channels), generator=generator, device=device, dtype=torch.float32).to(x.device, x.dtype)
    types = shape_masks(size).to(x.device)[labels.to(x.device)]
    rows = tops[:, None, None] + torch.arange(size, device=x.device)[None, :, None]
    columns = lefts[:, None, None] + torch.arange(size, device=x.device)[None, None, :]
    mask = torch.zeros((n, height, width), dtype=torch.bool, device=x.device)
    mask[torch.arange(n, device=x.device)[:, None, None], rows, columns] = types
    return torch.where(mask[:, None], colours[:, :, None, None], x)
