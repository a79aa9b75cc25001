"""Which classes are taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedfuse.report.plots.holdings import shades
from fedfuse.report.plots.style import (
    GRID,
    INK,
    MUTED,
    ON_ACCENT,
    WIDTH_IN,
    category_ticks,
    empty_picture,
    in_house_style,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_NUMBERS = 12
MOST_VECTOR_CELLS = 900


@in_house_style
def confusion_matrix(confusion: Sequence[Sequence[float]], class_names: Sequence[str]) -> Figure:
    """Shares of each true class that were given each name; the numbers are written where there are few classes.

    Args:
        confusion: counts, rows are the truth.
        class_names: one per class; missing ones are numbered.
    """
    counts = np.asarray(confusion, dtype=float)
    if counts.ndim != 2 or counts.size == 0 or counts.shape[0] != counts.shape[1]:
        return empty_picture("There is no confusion matrix: the model was not scored on a test set.")
    num_classes = len(counts)
    names = [*class_names[:num_classes], *(str(index) for index in range(len(class_names), num_classes))]
    sums = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(sums, 1e-300)
    # Mistakes are small beside the diagonal; the power lifts them into sight.
    shading = shares**0.7
    side_in = min(6.2, max(2.2, 0.58 * num_classes))
    cell_in = side_in / num_classes
    figure = new_figure(side_in + 1.3, min(WIDTH_IN, side_in + 2.0))
    axes = figure.subplots()
    axes.set_aspect("equal")
    axes.set_xlim(-0.5, num_classes - 0.5)
    axes.set_ylim(num_classes - 0.5, -0.5)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color(GRID)
    if num_classes**2 <= MOST_VECTOR_CELLS:
        edges = np.arange(num_classes + 1) - 0.5
        axes.pcolormesh(edges, edges, shades(shading), edgecolors="none", antialiased=False)
    else:
        axes.imshow(shades(shading), interpolation="nearest")
    if num_classes <= MOST_NUMBERS:
        for (row, column), share in np.ndenumerate(shares):
            if counts[row, column] > 0:
                text = "< 1" if share < 0.005 else f"{100 * share:.0f}"
                colour = ON_ACCENT if shading[row, column] > 0.55 else INK
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9.5)
    for row in np.flatnonzero(sums[:, 0] == 0):
        if num_classes <= MOST_NUMBERS:
            axes.text((num_classes - 1) / 2, float(row), "no test examples", ha="center", va="center", color=MUTED)
    category_ticks(axes, "x", names, cell_in, longest=14)
    category_ticks(axes, "y", names, cell_in, longest=14)
    axes.set_xlabel("class that the model names" + (" · per cent of each row" if num_classes <= MOST_NUMBERS else ""))
    axes.set_ylabel("true class")
    return figure
