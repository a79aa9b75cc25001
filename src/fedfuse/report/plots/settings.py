"""Accuracy of each method over a setting that was varied."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedfuse.report.plots.accuracy import percent_axis, window
from fedfuse.report.plots.style import (
    INK,
    MUTED,
    PALETTE,
    PAPER,
    QUIET,
    WIDTH_IN,
    empty_picture,
    in_house_style,
    new_figure,
)
from fedfuse.report.reading import Board, BoardRow
from fedfuse.report.units import in_words, number, shorten
from fedfuse.report.wording import UPPER_BOUND, base_name, method_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PANELS = 6
PANELS_A_ROW = 3
MOST_COLOURED = 12
_MARKERS = "os^Dv<>ph*Xd"


@in_house_style
def accuracy_against_setting(board: Board, key: str) -> Figure:
    """A line a method over the values of one setting; a panel for each choice of the other varied settings.

    Args:
        board: of a comparison whose settings were varied.
        key: the setting along the axis.
    """
    rows = [row for row in board.rows if row.accuracy is not None and key in row.varied]
    if not rows:
        return empty_picture("No method was scored: there is no test set.")
    panels: dict[str, list[BoardRow]] = {}
    for row in rows:
        rest = {name: value for name, value in row.varied.items() if name != key}
        panels.setdefault(in_words(rest), []).append(row)
    shown = list(panels.items())[:MOST_PANELS]
    columns = 2 if len(shown) == 4 else min(PANELS_A_ROW, len(shown))
    num_rows = -(-len(shown) // columns)
    mean = {
        label: sum(row.accuracy or 0.0 for row in rows if row.method == label)
        / sum(row.method == label for row in rows)
        for label in dict.fromkeys(row.method for row in rows)
    }
    ranked = sorted(mean, key=lambda label: -mean[label])
    # More lines than colours cannot be told apart: what readers look for keeps its colour, the rest is grey.
    known = [label for label in ranked if base_name(label) in UPPER_BOUND | {"fedavg"}]
    told = known if len(ranked) > MOST_COLOURED else []
    told = [*[label for label in ranked if label not in told][: MOST_COLOURED - len(told)], *told]
    told.sort(key=ranked.index)
    legend_in = 0.19 * -(-(len(told) + 1) // 3) + 0.25
    figure = new_figure(3.9 if columns == 1 else 3.0 * num_rows + legend_in, WIDTH_IN)
    grid = figure.subplots(num_rows, columns, sharey=True, squeeze=False)
    places = _places([value for value in board.varied.get(key, ()) if any(row.varied[key] == value for row in rows)])
    low, high = window([value for row in rows for value in ((row.accuracy or 0) - row.spread, row.accuracy or 0)])
    panels_of = grid.ravel()
    for axes, (title, group) in zip(panels_of, shown, strict=False):
        axes.set_ylim(low, high)
        axes.grid()
        for label in reversed(ranked):
            style = _style(label, told)
            _line(axes, [row for row in group if row.method == label], key, places, style)
        axes.set_title(shorten(title, 40), fontweight="normal")
        axes.set_xticks(list(places.values()), [shorten(str(json.loads(text)), 12) for text in places])
        percent_axis(axes, "y")
    for axes in panels_of[len(shown) :]:
        axes.remove()
    for index in range(max(0, len(shown) - columns), len(shown)):
        panels_of[index].set_xlabel(key.rpartition(".")[2])
    for axes in panels_of[: len(shown) : columns]:
        axes.set_ylabel("test accuracy")
    _legend(figure, panels_of[0], told, len(ranked) - len(told), beside=columns == 1)
    return figure


def _style(label: str, told: Sequence[str]) -> dict[str, Any]:
    """How a method's line looks."""
    if label not in told:
        return {"color": QUIET, "linewidth": 0.9, "alpha": 0.7, "zorder": 2}
    if base_name(label) in UPPER_BOUND:
        return {"color": MUTED, "marker": "o", "mfc": PAPER, "ms": 5, "linestyle": (0, (2, 2)), "zorder": 3}
    index = [name for name in told if base_name(name) not in UPPER_BOUND].index(label)
    return {
        "color": PALETTE[index % len(PALETTE)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "ms": 5,
        "linestyle": "-" if index < len(PALETTE) else (0, (5, 1.5)),
        "zorder": 3,
    }


def _line(
    axes: Axes, rows: Sequence[BoardRow], key: str, places: Mapping[str, float], style: Mapping[str, Any]
) -> None:
    """One method: its means, and its spread as a faint band."""
    points = sorted((places[_text(row.varied[key])], row.accuracy or 0.0, row.spread) for row in rows)
    x, y = [point[0] for point in points], [point[1] for point in points]
    axes.plot(x, y, **style)
    if "marker" in style and any(point[2] for point in points):
        low, high = [p[1] - p[2] for p in points], [p[1] + p[2] for p in points]
        axes.fill_between(x, low, high, color=style["color"], alpha=0.1, linewidth=0)


def _legend(figure: Figure, axes: Axes, told: Sequence[str], num_others: int, *, beside: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=shorten(method_title(label), 30), **_style(label, told)) for label in told]
    if num_others:
        handles.append(Line2D([], [], label=f"{num_others} others", **_style("", told)))
    where: dict[str, Any] = {"loc": "outside right center"} if beside else {"loc": "outside lower center", "ncols": 3}
    figure.legend(handles=handles, fontsize=8.8, labelcolor=INK, handlelength=2.6, **where)


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _places(values: Sequence[object]) -> dict[str, float]:
    """Where each value stands: positive numbers on a logarithmic axis, all else one beside the other."""
    numbers = [number(value) for value in values]
    if all(value is not None and value > 0 for value in numbers) and len(numbers) > 1:
        return {_text(value): math.log2(found or 1.0) for value, found in zip(values, numbers, strict=True)}
    return {_text(value): float(index) for index, value in enumerate(values)}
