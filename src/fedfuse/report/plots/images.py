"""Images that a method made or a model drew, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedfuse.report.plots.style import empty_picture, in_house_style, new_figure
from fedfuse.report.units import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_IMAGES = 64
_INCHES_PER_IMAGE = 0.55
_INCHES_FOR_NAMES = 1.5
_INCHES_FOR_TITLE = 0.5


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
    side = shown.shape[2] / shown.shape[3]
    figure = new_figure(num_rows * _INCHES_PER_IMAGE * side, num_columns * _INCHES_PER_IMAGE)
    _lay(figure, shown, num_columns).set_axis_off()
    return figure


@in_house_style
def drawing_sheet(images: np.ndarray, lines: Sequence[str], title: str = "") -> Figure:
    """Drawings, a line for each class.

    Args:
        images: 8-bit, shape ``(num_lines * num_columns, 1 or 3, height, width)``, line by line.
        lines: name of the class of each line.
        title: stands above.
    """
    if images.ndim != 4 or 0 in images.shape or images.shape[1] not in (1, 3) or not lines or len(images) % len(lines):
        return empty_picture("There are no drawings to show.")
    num_columns, side = len(images) // len(lines), images.shape[2] / images.shape[3]
    tall = len(lines) * _INCHES_PER_IMAGE * side + (_INCHES_FOR_TITLE if title else 0.0)
    figure = new_figure(tall, num_columns * _INCHES_PER_IMAGE + _INCHES_FOR_NAMES)
    axes = _lay(figure, images, num_columns)
    height = images.shape[2] + 1
    axes.set_yticks([height * (line + 0.5) for line in range(len(lines))], [shorten(name, 16) for name in lines])
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    if title:
        axes.set_title(title)
    return figure


def _lay(figure: Figure, images: np.ndarray, num_columns: int) -> Axes:
    """Lay images out side by side on white paper, read line by line."""
    num_rows = math.ceil(len(images) / num_columns)
    channels, height, width = images.shape[1:]
    paper = np.full((num_rows * (height + 1) - 1, num_columns * (width + 1) - 1, channels), 255, np.uint8)
    for position, image in enumerate(images):
        top, left = (position // num_columns) * (height + 1), (position % num_columns) * (width + 1)
        paper[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    axes = figure.subplots()
    axes.imshow(paper.squeeze(2) if channels == 1 else paper, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    return axes
