"""Accuracy of each method, alone and against what it costs to upload."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedfuse.report.plots.labels import place_labels
from fedfuse.report.plots.style import ACCENT, GRID, INK, MUTED, PAPER, QUIET, empty_picture, in_house_style, new_figure
from fedfuse.report.reading import BoardRow
from fedfuse.report.units import format_bytes, shorten
from fedfuse.report.wording import UPPER_BOUND, base_name, leader, method_title, score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@in_house_style
def accuracy_by_method(rows: Sequence[BoardRow]) -> Figure:
    """A dot for each method's mean, a bar for the standard deviation over seeds, small dots for the single seeds.

    Args:
        rows: of a board, in any order; those without an accuracy are left out.
    """
    scored = sorted((row for row in rows if row.accuracy is not None), key=lambda row: row.accuracy or 0.0)
    if not scored:
        return empty_picture("No method was scored: there is no test set.")
    best = leader(scored)
    figure = new_figure(0.4 * len(scored) + 0.95)
    axes = figure.subplots()
    axes.set_xlim(*_window([value for row in scored for value in _reach(row)]))
    axes.set_ylim(-0.6, len(scored) - 0.4)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    for height, row in enumerate(scored):
        mean, colour = row.accuracy or 0.0, ACCENT if row is best else MUTED
        axes.axhline(height, color=GRID, linewidth=0.8, zorder=1)
        if len(row.accuracies) > 1:
            axes.errorbar(mean, height, xerr=row.spread, color=colour, linewidth=2.4, zorder=3)
            axes.plot(
                row.accuracies, [height - 0.24] * len(row.accuracies), "o", ms=3.6, mew=0, color=colour, alpha=0.55
            )
        _dot(axes, mean, height, row, colour)
        axes.annotate(
            score(row.accuracy, row.spread if len(row.accuracies) > 1 else None),
            (1.015, height),
            xycoords=("axes fraction", "data"),
            va="center",
            color=colour if row is best else INK,
            fontweight="bold" if row is best else "normal",
        )
    axes.set_yticks(range(len(scored)), [shorten(method_title(row.method), 34) for row in scored])
    _percent_axis(axes, "x")
    axes.set_xlabel("test accuracy" + (" · mean ± standard deviation over seeds" if _seeded(scored) else ""))
    return figure


@in_house_style
def accuracy_against_upload(rows: Sequence[BoardRow]) -> Figure:
    """Accuracy over the bytes that one client uploads, with the line of the methods that no other beats in both.

    Args:
        rows: of a board; those without an accuracy or an upload size are left out.
    """
    scored = [row for row in rows if row.accuracy is not None and "upload_bytes" in row.costs]
    if not scored:
        return empty_picture("No method has both an accuracy and an upload size.")
    positive = [row.costs["upload_bytes"] for row in scored if row.costs["upload_bytes"] >= 1]
    lowest = min(positive, default=1024.0)
    # A logarithmic axis has no zero: methods that upload nothing stand left of all others, on a mark of their own.
    places = [_log2(row.costs["upload_bytes"], lowest) for row in scored]
    best, front = leader(scored), pareto_front(scored)
    figure = new_figure(4.6)
    axes = figure.subplots()
    axes.set_xlim(*_pad(min(places), max(places), 0.9))
    axes.set_ylim(*_window([value for row in scored for value in _reach(row)]))
    axes.grid()
    line = sorted((place, row.accuracy or 0.0) for place, row in zip(places, scored, strict=True) if row in front)
    steps = _steps(line, axes.get_xlim()[1])
    axes.plot([x for x, _ in steps], [y for _, y in steps], color=ACCENT, alpha=0.35, linewidth=2, zorder=1)
    strokes = list(itertools.pairwise(steps))
    for place, row in zip(places, scored, strict=True):
        colour = ACCENT if row in front else MUTED
        if len(row.accuracies) > 1:
            low, high = (row.accuracy or 0.0) - row.spread, (row.accuracy or 0.0) + row.spread
            axes.plot([place, place], [low, high], color=colour, linewidth=1.4, alpha=0.7, zorder=2)
            strokes.append(((place, low), (place, high)))
        _dot(axes, place, row.accuracy or 0.0, row, colour)
    _bytes_axis(axes, lowest, any(row.costs["upload_bytes"] < 1 for row in scored))
    _percent_axis(axes, "y")
    axes.set_xlabel("uploaded by one client (logarithmic)")
    axes.set_ylabel("test accuracy")
    place_labels(
        axes,
        [(place, row.accuracy or 0.0) for place, row in zip(places, scored, strict=True)],
        [shorten(method_title(row.method), 30) for row in scored],
        [ACCENT if row is best else INK for row in scored],
        strokes,
    )
    return figure


def pareto_front(rows: Sequence[BoardRow]) -> list[BoardRow]:
    """The methods that no other beats: none is at least as accurate with at most as many bytes, and better in one.

    Args:
        rows: of a board; those without an accuracy or an upload size are on no front, nor is training on pooled data.

    Example:
        >>> small = BoardRow("small", 0.6, 0.0, (), 1, {"upload_bytes": 10.0}, ())
        >>> large = BoardRow("large", 0.9, 0.0, (), 1, {"upload_bytes": 99.0}, ())
        >>> worse = BoardRow("worse", 0.5, 0.0, (), 1, {"upload_bytes": 50.0}, ())
        >>> [row.method for row in pareto_front([small, large, worse])]
        ['small', 'large']
    """
    points = [
        (row.costs["upload_bytes"], -row.accuracy, row)
        for row in rows
        if row.accuracy is not None and "upload_bytes" in row.costs and base_name(row.method) not in UPPER_BOUND
    ]
    return [
        row
        for size, error, row in points
        if not any(s <= size and e <= error and (s < size or e < error) for s, e, _ in points)
    ]


def _steps(line: Sequence[tuple[float, float]], right: float) -> list[tuple[float, float]]:
    """Corners of the stairs through the points of a front, on to the right edge."""
    corners: list[tuple[float, float]] = []
    for x, y in line:
        corners += [(x, corners[-1][1]), (x, y)] if corners else [(x, y)]
    return [*corners, (right, corners[-1][1])] if corners else []


def _dot(axes: Axes, x: float, y: float, row: BoardRow, colour: str) -> None:
    hollow = base_name(row.method) in UPPER_BOUND
    axes.plot([x], [y], "o", ms=9, mew=1.8, mec=colour, mfc=PAPER if hollow else colour, zorder=4)


def _seeded(rows: Sequence[BoardRow]) -> bool:
    return any(len(row.accuracies) > 1 for row in rows)


def _reach(row: BoardRow) -> list[float]:
    mean = row.accuracy or 0.0
    return [mean - row.spread, mean + row.spread, *row.accuracies]


def _window(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis of accuracies: the values with some air, inside 0 to 100 %."""
    low, high = _pad(min(values), max(values), 0.03)
    return max(low, min(0.0, *values) - 0.015), min(high, max(1.0, *values) + 0.015)


def _pad(low: float, high: float, least: float) -> tuple[float, float]:
    air = max((high - low) * 0.08, least)
    return low - air, high + air


def _percent_axis(axes: Axes, side: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis = axes.xaxis if side == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))


def _log2(num_bytes: float, lowest: float) -> float:
    return math.log2(num_bytes if num_bytes >= 1 else lowest) - (0.0 if num_bytes >= 1 else 2.0)


def _bytes_axis(axes: Axes, lowest: float, with_nothing: bool) -> None:
    """Marks at 1, 2, 4, 8 ... bytes, of which so many are shown that they do not touch."""
    low, high = axes.get_xlim()
    nothing = _log2(0, lowest)
    first = math.floor(nothing + 1.6) if with_nothing else math.ceil(low)
    step = max(1, math.ceil((high - max(first, low)) / 7))
    powers = [power for power in range(max(first, 0), math.floor(high) + 1) if power % step == 0]
    places: list[float] = [float(power) for power in powers]
    texts = [format_bytes(2.0**power) for power in powers]
    if with_nothing:
        kept = [
            (place, text) for place, text in zip(places, texts, strict=True) if place > nothing + 0.12 * (high - low)
        ]
        places, texts = [nothing, *(place for place, _ in kept)], ["nothing", *(text for _, text in kept)]
        axes.axvline(nothing + 1.0, color=QUIET, linewidth=0.8, linestyle=(0, (2, 3)))
    axes.set_xticks(places, texts)
