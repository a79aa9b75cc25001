"""Accuracy of each method, alone and against what it costs to upload."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedfuse.report.plots.labels import place_labels, place_numbers
from fedfuse.report.plots.style import ACCENT, GRID, INK, MUTED, PAPER, QUIET, empty_picture, in_house_style, new_figure
from fedfuse.report.reading import BoardRow
from fedfuse.report.units import format_bytes, format_seconds, shorten
from fedfuse.report.wording import UPPER_BOUND, base_name, leader, method_title, score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MOST_NAMED = 10


@dataclass(frozen=True)
class CostScale:
    """How a cost is drawn.

    Args:
        title: of its axis.
        noun: what a method without it lacks.
        least: what is below counts as nothing.
        marks: where the axis may be marked.
        written: how a value is read.
    """

    title: str
    noun: str
    least: float
    marks: Sequence[float]
    written: Callable[[float | None], str]


SCALES = {
    "upload_bytes": CostScale(
        "uploaded by one client", "an upload size", 1.0, [2.0**power for power in range(50)], format_bytes
    ),
    "server_seconds": CostScale(
        "computing of the server",
        "a server time",
        0.0005,
        [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 180, 600, 1800, 3600, 10800, 36000, 108000, 360000],
        format_seconds,
    ),
}


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
    axes.set_xlim(*window([value for row in scored for value in _reach(row)]))
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
    percent_axis(axes, "x")
    axes.set_xlabel("test accuracy" + (" · mean ± standard deviation over seeds" if _seeded(scored) else ""))
    return figure


@in_house_style
def accuracy_against_cost(rows: Sequence[BoardRow], cost: str = "upload_bytes") -> Figure:
    """Accuracy over what a method costs, with the line of the methods that no other beats in both.

    Up to ten methods are named beside their points; more are numbered by rank and named in a list at the side.

    Args:
        rows: of a board; those without an accuracy or that cost are left out.
        cost: ``upload_bytes`` of one client, or ``server_seconds``.
    """
    scale = SCALES[cost]
    scored = [row for row in rows if row.accuracy is not None and cost in row.costs]
    if not scored:
        return empty_picture(f"No method has both an accuracy and {scale.noun}.")
    scored.sort(key=lambda row: -(row.accuracy or 0.0))
    lowest = min((row.costs[cost] for row in scored if row.costs[cost] >= scale.least), default=scale.least)
    # A logarithmic axis has no zero: methods that cost nothing stand left of all others, on a mark of their own.
    places = [_log2(row.costs[cost], lowest, scale.least) for row in scored]
    best, front = leader(scored), pareto_front(scored, cost)
    numbered = len(scored) > MOST_NAMED
    figure = new_figure(max(4.6, 0.185 * len(scored) + 0.9) if numbered else 4.6)
    if numbered:
        axes, listed = figure.subplots(1, 2, width_ratios=(2.6, 1))
    else:
        axes, listed = figure.subplots(), None
    axes.set_xlim(*_pad(min(places), max(places), 0.9))
    axes.set_ylim(*window([value for row in scored for value in _reach(row)]))
    axes.grid()
    line = sorted((place, row.accuracy or 0.0) for place, row in zip(places, scored, strict=True) if row in front)
    steps = _steps(line, axes.get_xlim()[1])
    axes.plot([x for x, _ in steps], [y for _, y in steps], color=ACCENT, alpha=0.35, linewidth=2, zorder=1)
    strokes = list(itertools.pairwise(steps))
    for place, row in zip(places, scored, strict=True):
        colour = ACCENT if row in front else MUTED
        if len(row.accuracies) > 1:
            low, high = (row.accuracy or 0.0) - row.spread, (row.accuracy or 0.0) + row.spread
            # Among many methods the bars of the others would hide the points.
            faint = numbered and row not in front
            axes.plot([place, place], [low, high], color=colour, linewidth=1.4, alpha=0.25 if faint else 0.7, zorder=2)
            if not numbered:
                strokes.append(((place, low), (place, high)))
        _dot(axes, place, row.accuracy or 0.0, row, colour, size=6 if numbered else 9)
    _cost_axis(axes, lowest, any(row.costs[cost] < scale.least for row in scored), scale)
    percent_axis(axes, "y")
    axes.set_xlabel(f"{scale.title} (logarithmic)")
    axes.set_ylabel("test accuracy")
    points = [(place, row.accuracy or 0.0) for place, row in zip(places, scored, strict=True)]
    colours = [ACCENT if row is best else INK for row in scored]
    if listed is not None:
        _list_methods(listed, scored, best, front)
        place_numbers(axes, points, colours)
    else:
        place_labels(axes, points, [shorten(method_title(row.method), 30) for row in scored], colours, strokes)
    return figure


def _list_methods(axes: Axes, rows: Sequence[BoardRow], best: BoardRow | None, front: Sequence[BoardRow]) -> None:
    """Number, name and accuracy of each method, from top to bottom."""
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    for line, row in enumerate(rows):
        style: dict[str, Any] = {"va": "center", "fontsize": 8.6, "color": ACCENT if row in front else INK}
        style["fontweight"] = "bold" if row is best else "normal"
        axes.text(0.09, line, f"{line + 1}", ha="right", **style)
        axes.text(0.13, line, shorten(method_title(row.method), 25), **style)
        axes.text(1.0, line, f"{100 * (row.accuracy or 0.0):.1f}", ha="right", **style)


def pareto_front(rows: Sequence[BoardRow], cost: str = "upload_bytes") -> list[BoardRow]:
    """The methods that no other beats: none is at least as accurate at no higher cost, and better in one.

    Args:
        rows: of a board; those without an accuracy or that cost are on no front, nor is training on pooled data.
        cost: which cost.

    Example:
        >>> small = BoardRow("small", 0.6, 0.0, (), 1, {"upload_bytes": 10.0}, ())
        >>> large = BoardRow("large", 0.9, 0.0, (), 1, {"upload_bytes": 99.0}, ())
        >>> worse = BoardRow("worse", 0.5, 0.0, (), 1, {"upload_bytes": 50.0}, ())
        >>> [row.method for row in pareto_front([small, large, worse])]
        ['small', 'large']
    """
    points = [
        (row.costs[cost], -row.accuracy, row)
        for row in rows
        if row.accuracy is not None and cost in row.costs and base_name(row.method) not in UPPER_BOUND
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


def _dot(axes: Axes, x: float, y: float, row: BoardRow, colour: str, size: float = 9) -> None:
    hollow = base_name(row.method) in UPPER_BOUND
    axes.plot([x], [y], "o", ms=size, mew=1.8 * size / 9, mec=colour, mfc=PAPER if hollow else colour, zorder=4)


def _seeded(rows: Sequence[BoardRow]) -> bool:
    return any(len(row.accuracies) > 1 for row in rows)


def _reach(row: BoardRow) -> list[float]:
    mean = row.accuracy or 0.0
    return [mean - row.spread, mean + row.spread, *row.accuracies]


def window(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis of accuracies: the values with some air, inside 0 to 100 %.

    Args:
        values: that must be seen.
    """
    low, high = _pad(min(values), max(values), 0.03)
    return max(low, min(0.0, *values) - 0.015), min(high, max(1.0, *values) + 0.015)


def _pad(low: float, high: float, least: float) -> tuple[float, float]:
    air = max((high - low) * 0.08, least)
    return low - air, high + air


def percent_axis(axes: Axes, side: str) -> None:
    """Mark an axis of accuracies in per cent.

    Args:
        axes: where.
        side: ``x`` or ``y``.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis = axes.xaxis if side == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))


def _log2(value: float, lowest: float, least: float) -> float:
    return math.log2(value if value >= least else lowest) - (0.0 if value >= least else 2.0)


def _cost_axis(axes: Axes, lowest: float, with_nothing: bool, scale: CostScale) -> None:
    """Round marks, of which so many are shown that they do not touch."""
    low, high = axes.get_xlim()
    nothing = _log2(0, lowest, scale.least)
    first = nothing + 1.6 if with_nothing else low
    marks = [place for mark in scale.marks if first <= (place := math.log2(mark)) <= high]
    step = max(1, math.ceil(len(marks) / 7))
    places: list[float] = marks[::step]
    texts = [scale.written(2.0**place) for place in places]
    if with_nothing:
        kept = [
            (place, text) for place, text in zip(places, texts, strict=True) if place > nothing + 0.12 * (high - low)
        ]
        places, texts = [nothing, *(place for place, _ in kept)], ["nothing", *(text for _, text in kept)]
        axes.axvline(nothing + 1.0, color=QUIET, linewidth=0.8, linestyle=(0, (2, 3)))
    axes.set_xticks(places, texts)
