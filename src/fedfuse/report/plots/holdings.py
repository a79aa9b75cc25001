"""Who holds what: examples by client and class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedfuse.report.plots.style import (
    ACCENT,
    GRID,
    MUTED,
    QUIET,
    WIDTH_IN,
    category_ticks,
    empty_picture,
    in_house_style,
    new_figure,
)
from fedfuse.report.units import format_count, natural_key

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_BUBBLES = 30
MATRIX_IN = 5.9


@in_house_style
def who_holds_what(label_counts: Mapping[str, Sequence[float]], class_names: Sequence[str]) -> Figure:
    """Bubbles of client against class, and each client's total; shades of a colour where there are too many bubbles.

    Args:
        label_counts: examples of each class, by client id.
        class_names: one per class; missing ones are numbered.
    """
    clients = sorted(label_counts, key=natural_key)
    counts, names = _matrix([label_counts[client] for client in clients], class_names)
    if counts.size == 0:
        return empty_picture("The run does not say which client holds which classes.")
    few = len(clients) <= MOST_BUBBLES
    row_in = max(0.34, min(0.5, 1.8 / len(clients))) if few else max(0.075, min(0.16, 7.5 / len(clients)))
    figure = new_figure(len(clients) * row_in + 1.25)
    matrix, totals = figure.subplots(1, 2, sharey=True, width_ratios=(MATRIX_IN, WIDTH_IN - MATRIX_IN - 1.2))
    draw_holdings(matrix, counts, MATRIX_IN / len(names), row_in)
    category_ticks(matrix, "x", names, MATRIX_IN / len(names), longest=14)
    category_ticks(matrix, "y", clients, row_in)
    look = "area" if max(counts.shape) <= MOST_BUBBLES else "shade"
    matrix.set_xlabel(f"class · {look}: examples, at most {format_count(counts.max())} in one place")

    sums = counts.sum(axis=1)
    totals.barh(range(len(clients)), sums, height=0.62 if few else 0.9, color=QUIET)
    totals.tick_params(labelleft=False)
    totals.set_xlim(0, max(float(sums.max()), 1.0) * (1.35 if few else 1.05))
    totals.spines[:].set_visible(False)
    totals.set_xlabel("examples")
    if few:
        totals.set_xticks([])
        for row, total in enumerate(sums):
            totals.annotate(
                format_count(total), (total, row), (4, 0), textcoords="offset points", va="center", fontsize=9.5
            )
    else:
        totals.locator_params(axis="x", nbins=3)
        totals.grid(axis="x")
    return figure


def draw_holdings(axes: Axes, counts: np.ndarray, column_in: float, row_in: float) -> None:
    """Draw one matrix of counts: bubbles if they are few enough to be seen, otherwise shades.

    Args:
        axes: where.
        counts: examples, shape ``(num_clients, num_classes)``.
        column_in: width of a column in inches.
        row_in: height of a row in inches.
    """
    num_clients, num_classes = counts.shape
    most = max(float(counts.max()), 1.0)
    axes.set_xlim(-0.5, num_classes - 0.5)
    axes.set_ylim(num_clients - 0.5, -0.5)
    axes.spines[:].set_visible(False)
    if max(counts.shape) <= MOST_BUBBLES:
        axes.grid(color=GRID)
        rows, columns = np.nonzero(counts)
        widest_pt = 72 * min(column_in, row_in) * 0.95
        axes.scatter(columns, rows, s=widest_pt**2 * counts[rows, columns] / most, color=ACCENT, linewidths=0, zorder=2)
        empty_rows = np.flatnonzero(counts.sum(axis=1) == 0)
        for row in empty_rows:
            axes.text(-0.4, float(row), "no examples", color=MUTED, va="center", fontsize=9)
    else:
        # The root shows small holdings that a linear shade would hide beside a large one.
        axes.imshow(shades(np.sqrt(counts / most)), aspect="auto", interpolation="nearest")


def shades(shares: np.ndarray) -> np.ndarray:
    """The accent colour, more or less transparent: so one picture suits a light and a dark page.

    Args:
        shares: in [0, 1], any shape.

    Returns:
        Red, green, blue and opacity in [0, 1], shape ``(*shares.shape, 4)``.
    """
    from matplotlib.colors import to_rgb

    colours = np.empty((*shares.shape, 4))
    colours[..., :3] = to_rgb(ACCENT)
    colours[..., 3] = np.clip(shares, 0.0, 1.0)
    return colours


def _matrix(rows: Sequence[Sequence[float]], class_names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    num_classes = max([len(class_names), *(len(row) for row in rows)])
    counts = np.zeros((len(rows), num_classes))
    for index, row in enumerate(rows):
        counts[index, : len(row)] = row
    return counts, [*class_names, *(str(index) for index in range(len(class_names), num_classes))]
