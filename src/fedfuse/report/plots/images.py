"""Images that a method made, side by side."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fedfuse.report.plots.style import empty_picture, in_house_style, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_IMAGES = 64
_INCHES_PER_IMAGE = 0.55


@in_house_style
def image_sheet(images: np.ndarray) -> Figure:
    """Up to 64 images on one sheet, read line by line.

    Args:
        images: 8-bit, shape ``(n, 1 or 3, height, width)``.
    """
    if images.ndim != 4 or 0 in images.shape or images.shape[1] not in (1, 3):
        return empty_picture("There are no images to show.")
    shown = images[:MOST_IMAGES]
    num_columns = min(len(shown), 2 ** math.ceil(math.log2(len(shown)) / 2))
    num_rows = math.ceil(len(shown) / num_columns)
    channels, height, width = shown.shape[1:]
    sheet = np.full((num_rows * (height + 1) - 1, num_columns * (width + 1) - 1, channels), 255, np.uint8)
    for position, image in enumerate(shown):
        top, left = (position // num_columns) * (height + 1), (position % num_columns) * (width + 1)
        sheet[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    figure = new_figure(num_columns * _INCHES_PER_IMAGE, num_rows * _INCHES_PER_IMAGE * height / width)
    axes = figure.subplots()
    axes.imshow(sheet.squeeze(2) if channels == 1 else sheet, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_axis_off()
    return figure
