"""Image files to tensors."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.data.cache import cache_path, cached
from fedfuse.data.checks import check_at_least, optional_module

ImageItem = bytes | Path
"""An encoded image: its bytes, or the file that holds them."""

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})
"""What files of images end with, in lower case."""

_GREY_MODES = ("1", "L", "LA", "La")


def check_image_settings(size: int | None, channels: int | None) -> None:
    """Refuse settings that no image can have.

    Args:
        size: side to resize to, in pixels; ``None`` keeps the images' own.
        channels: 1 for grey, 3 for colour; ``None`` finds out.

    Raises:
        ConfigError: one of them cannot be.
    """
    if size is not None:
        check_at_least("source.size", size, 1)
    if channels not in (None, 1, 3):
        raise ConfigError(
            f"channels must be 1 or 3, not {channels}", where="source.channels", fix="1 is grey, 3 is colour"
        )


def to_unit_range(images: Tensor) -> Tensor:
    """Bytes 0 .. 255 to float32 in [0, 1].

    Args:
        images: uint8, any shape.
    """
    return images.to(torch.float32).div_(255)


def cached_images(
    digest: str,
    read: Callable[[int | None], Sequence[ImageItem]],
    *,
    num_images: int,
    limit: int | None,
    size: int | None,
    channels: int | None,
    where: str,
) -> Tensor:
    """Decode images once and keep the bytes of their pixels.

    Args:
        digest: names the files and the column.
        read: gives the first so many encoded images, or all; called only if the cache does not have them.
        num_images: how many there are.
        limit: how many are wanted; ``None`` means all.
        size: side to resize to, in pixels; ``None`` keeps the images' own.
        channels: 1, 3, or ``None`` for 3 if any image is in colour.
        where: what error messages call the data.

    Returns:
        Pixels, uint8, shape ``(n, channels, height, width)``.

    Raises:
        DataError: an image cannot be read, or sizes differ.
    """
    if limit is not None and limit >= num_images:
        limit = None
    path = cache_path(digest, size, channels, limit)
    return cached(path, lambda: decode_images(read(limit), size=size, channels=channels, where=where))


def decode_images(
    items: Sequence[ImageItem], *, size: int | None = None, channels: int | None = None, where: str = ""
) -> Tensor:
    """Decode images to one tensor.

    Args:
        items: encoded images.
        size: side to resize to, in pixels; ``None`` keeps the images' own, which must then be equal.
        channels: 1, 3, or ``None`` for 3 if any image is in colour.
        where: what error messages call the data.

    Returns:
        Pixels, uint8, shape ``(n, channels, height, width)``.

    Raises:
        DataError: an image cannot be read, or sizes differ.
    """
    image_module = optional_module("PIL.Image", package="pillow", extra="data")

    def decode(numbered: tuple[int, ImageItem]) -> np.ndarray:
        row, item = numbered
        name = str(item) if isinstance(item, Path) else f"{where}, row {row}".removeprefix(", ")
        try:
            with image_module.open(io.BytesIO(item) if isinstance(item, bytes) else item) as image:
                return pixels(image, size=size, channels=channels)
        except DataError as error:
            raise DataError(error.what, where=name, fix=error.fix) from None
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(
                f"an image cannot be read: {type(error).__name__}", where=name, fix="replace the file or take it out"
            ) from None

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return stack_pixels(list(pool.map(decode, enumerate(items), chunksize=256)), where=where)


def pixels(image: Any, *, size: int | None = None, channels: int | None = None) -> np.ndarray:
    """The pixels of one PIL image.

    Args:
        image: of any mode but floating point; 16-bit greys lose their lower 8 bits, transparency is dropped.
        size: side to resize to, in pixels; ``None`` keeps the image's own.
        channels: 1, 3, or ``None`` for what the image has.

    Returns:
        uint8, shape ``(channels, height, width)``.

    Raises:
        DataError: the pixels are floating point numbers.
    """
    if image.mode.startswith("I"):
        image_module = optional_module("PIL.Image", package="pillow", extra="data")
        image = image_module.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise DataError("an image has floating point pixels", fix="save it with 8 or 16 bits per pixel")
    is_grey = channels == 1 or (channels is None and image.mode in _GREY_MODES)
    image = image.convert("L" if is_grey else "RGB")
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), resample=2)  # 2 is bilinear
    array = np.asarray(image)
    return array[None] if is_grey else np.ascontiguousarray(array.transpose(2, 0, 1))


def stack_pixels(arrays: Sequence[np.ndarray], *, where: str = "") -> Tensor:
    """Put images of one size into one tensor; grey ones become colour if any is in colour.

    Args:
        arrays: uint8, each of shape ``(channels, height, width)``.
        where: what error messages call the data.

    Returns:
        Pixels, uint8, shape ``(n, channels, height, width)``.

    Raises:
        DataError: there is no image, or sizes differ.
    """
    if not arrays:
        raise DataError("there are no images", where=where)
    sides = arrays[0].shape[1:]
    for row, array in enumerate(arrays):
        if array.shape[1:] != sides:
            raise DataError(
                f"image 0 has {sides[0]} x {sides[1]} pixels and image {row} has {array.shape[1]} x {array.shape[2]}",
                where=where,
                fix="set size to resize them all",
            )
    num_channels = max(array.shape[0] for array in arrays)
    out = np.empty((len(arrays), num_channels, *sides), dtype=np.uint8)
    for row, array in enumerate(arrays):
        out[row] = array
    return torch.from_numpy(out)
