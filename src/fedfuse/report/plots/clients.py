"""What each client has and gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from fedfuse.report.plots.style import (
    ACCENT,
    INK,
    MUTED,
    QUIET,
    WARN,
    WIDTH_IN,
    category_ticks,
    empty_picture,
    in_house_style,
    new_figure,
)
from fedfuse.report.reading import ClientRow
from fedfuse.report.units import format_count, format_percent, natural_key

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NUMBERS = 14
PLOT_IN = WIDTH_IN - 1.0


@in_house_style
def client_bars(
    clients: Sequence[ClientRow],
    missing: Mapping[str, str] | None = None,
    accuracy: float | None = None,
    accuracy_name: str = "test",
) -> Figure:
    """Accuracy and number of examples of each client, one above the other; a cross marks a client without an answer.

    Args:
        clients: of a run.
        missing: reason by client id.
        accuracy: of the whole run, drawn as a line; ``None`` draws none.
        accuracy_name: what the line is called, one word.
    """
    from matplotlib.ticker import MaxNLocator

    rows = {client.name: client for client in clients}
    names = sorted({*rows, *(missing or {})}, key=natural_key)
    if not names:
        return empty_picture("The run names no client.")
    scores = {name: row.accuracy for name, row in rows.items() if row.accuracy is not None}
    sizes = {name: row.num_examples for name, row in rows.items() if row.num_examples is not None}
    kinds = sorted({row.accuracy_kind for row in rows.values() if row.accuracy is not None and row.accuracy_kind})
    figure = new_figure(4.6 if scores else 2.6)
    if scores:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1.5, 1))
        _bars(top, names, scores, ACCENT, lambda value: format_percent(value, 0), accuracy)
        top.set_ylim(0, 1.17)
        top.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0 %", "25 %", "50 %", "75 %", "100 %"])
        top.set_title("accuracy: " + (", ".join(kinds) if kinds else "one bar a client"))
        if accuracy is not None:
            top.axhline(accuracy, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=3)
            top.annotate(
                f"{accuracy_name}\n{format_percent(accuracy)}",
                (1.008, accuracy),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=9.5,
            )
        top.tick_params(labelbottom=False)
    else:
        bottom = figure.subplots()
    _bars(bottom, names, sizes, QUIET, format_count)
    bottom.set_ylim(0, max([*sizes.values(), 1.0]) * 1.22)
    bottom.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    split = any(sum(row.label_counts) > (row.num_examples or 0.0) for row in rows.values() if row.label_counts)
    bottom.set_title("training examples" + (", without the validation part" if split else ""))
    category_ticks(bottom, "x", names, PLOT_IN / len(names))
    absent = [index for index, name in enumerate(names) if name in (missing or {})]
    for axes in figure.axes:
        axes.plot(absent, [0.03] * len(absent), "x", color=WARN, ms=7, mew=2, transform=axes.get_xaxis_transform())
    if absent:
        bottom.set_xlabel("× gave no answer", color=MUTED)
    return figure


def _bars(
    axes: Axes,
    names: Sequence[str],
    values: Mapping[str, float],
    colour: str,
    written: Callable[[float], str],
    line: float | None = None,
) -> None:
    places = [index for index, name in enumerate(names) if name in values]
    heights = [values[names[index]] for index in places]
    axes.bar(places, heights, width=min(0.72, 0.12 * len(names)) if len(names) < 6 else 0.72, color=colour)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.spines["left"].set_visible(False)
    if len(names) > MOST_NUMBERS:
        axes.grid(axis="y")
    else:
        for place, height in zip(places, heights, strict=True):
            # A number that the line would strike through stands above the line.
            foot = max(line, height) if line is not None and line <= height + 0.14 else height
            axes.annotate(written(height), (place, foot), (0, 3), textcoords="offset points", ha="center", fontsize=9)
