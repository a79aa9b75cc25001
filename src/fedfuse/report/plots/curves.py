"""How clients' training went, epoch by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedfuse.report.plots.style import (
    ACCENT,
    MUTED,
    PALETTE,
    QUIET,
    WIDTH_IN,
    empty_picture,
    in_house_style,
    new_figure,
)
from fedfuse.report.reading import Curve
from fedfuse.report.units import natural_key, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PANELS = 12
PANELS_A_ROW = 4


@in_house_style
def learning_curves(curves: Sequence[Curve], name: str = "train_loss") -> Figure:
    """One line a client, one panel an exchange; of many exchanges some are shown, the first and the last among them.

    With more clients than colours the lines are grey and their median is drawn over them.

    Args:
        curves: of a run.
        name: which quantity.
    """
    chosen = [curve for curve in curves if curve.name == name]
    if not chosen:
        return empty_picture(f"The run logged no {_words(name)}.")
    exchanges = list(dict.fromkeys(curve.exchange for curve in chosen))
    shown = shown_exchanges(exchanges)
    clients = sorted({curve.client for curve in chosen}, key=natural_key)
    colours = dict(zip(clients, PALETTE, strict=False)) if len(clients) <= len(PALETTE) else {}
    num_rows = -(-len(shown) // PANELS_A_ROW)
    columns = -(-len(shown) // num_rows)
    figure = new_figure(2.25 * num_rows + 0.75, WIDTH_IN if columns > 1 else 5.6)
    panels = figure.subplots(num_rows, columns, sharey=True, squeeze=False).ravel()
    for panel, exchange in zip(panels, shown, strict=False):
        _panel(panel, [curve for curve in chosen if curve.exchange == exchange], colours)
        panel.set_title(shorten(exchange, 22), fontweight="normal")
        if "accuracy" in name:
            panel.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
    for panel in panels[len(shown) :]:
        panel.remove()
    figure.supxlabel("epoch", fontsize=10, color=MUTED)
    figure.supylabel(_words(name), fontsize=10, color=MUTED)
    if colours:
        from matplotlib.lines import Line2D

        handles = [Line2D([], [], color=colours[client], label=shorten(client, 16)) for client in clients]
    else:
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], color=QUIET, label="one client"),
            Line2D([], [], color=ACCENT, linewidth=2.2, label="median"),
        ]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 6 if columns > 1 else 4))
    return figure


def shown_exchanges(exchanges: Sequence[str]) -> list[str]:
    """At most as many exchanges as there is room for, evenly spread from the first to the last.

    Args:
        exchanges: in order of asking.

    Example:
        >>> len(shown_exchanges([f"round_{k}" for k in range(50)]))
        12
    """
    if len(exchanges) <= MOST_PANELS:
        return list(exchanges)
    places = np.linspace(0, len(exchanges) - 1, MOST_PANELS).round().astype(int)
    return [exchanges[place] for place in places]


def _panel(axes: Axes, curves: Sequence[Curve], colours: dict[str, str]) -> None:
    from matplotlib.ticker import MaxNLocator

    longest = max(len(curve.values) for curve in curves)
    for curve in curves:
        epochs = range(1, len(curve.values) + 1)
        colour = colours.get(curve.client, QUIET)
        thin, opacity = (1.6, 1.0) if colours else (0.8, 0.55)
        axes.plot(
            epochs,
            curve.values,
            color=colour,
            linewidth=thin,
            alpha=opacity,
            marker="o" if longest == 1 else "",
            ms=5,
        )
    if not colours:
        table = np.full((len(curves), longest), np.nan)
        for index, curve in enumerate(curves):
            table[index, : len(curve.values)] = curve.values
        known = ~np.isnan(table).all(axis=0)
        epochs_known = np.arange(1, longest + 1)[known]
        median = np.nanmedian(table[:, known], axis=0)
        axes.plot(epochs_known, median, color=ACCENT, linewidth=2.2, marker="o" if longest == 1 else "", ms=6)
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=1))
    axes.margins(x=0.04)
    if longest == 1:
        axes.set_xlim(0.5, 1.5)


def _words(name: str) -> str:
    return {"train_loss": "training loss"}.get(name, name.replace("_", " "))
