"""What methods and exchanges cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fedfuse.report.plots.curves import shown_exchanges
from fedfuse.report.plots.style import ACCENT, QUIET, empty_picture, in_house_style, new_figure
from fedfuse.report.reading import BoardRow, ExchangeRow
from fedfuse.report.units import format_bytes, format_seconds, shorten
from fedfuse.report.wording import leader, method_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("upload_bytes", "upload per client", format_bytes),
    ("download_bytes", "download per client", format_bytes),
    ("storage_bytes", "server storage, peak", format_bytes),
    ("artifact_bytes", "size of the result", format_bytes),
    ("client_seconds", "client time, all clients", format_seconds),
    ("server_seconds", "server time", format_seconds),
)


@in_house_style
def cost_bars(rows: Sequence[BoardRow]) -> Figure:
    """Bytes and seconds of each method, a panel for each kind of cost; the most accurate method stands out.

    Args:
        rows: of a board, drawn from top to bottom in this order.
    """
    panels = [panel for panel in PANELS if any(panel[0] in row.costs for row in rows)]
    if not panels:
        return empty_picture("The costs were not counted.")
    columns = min(3, len(panels))
    num_rows = -(-len(panels) // columns)
    figure = new_figure(num_rows * (0.3 * len(rows) + 0.6) + 0.15)
    grid = figure.subplots(num_rows, columns, sharey=True, squeeze=False)
    names = [shorten(method_title(row.method), 22) for row in rows]
    best = leader(rows)
    colours = [ACCENT if row is best else QUIET for row in rows]
    for axes, (key, title, written) in zip(grid.ravel(), panels, strict=False):
        _bars(axes, names, [row.costs.get(key) for row in rows], written, colours)
        axes.set_title(title, fontweight="normal")
    for axes in grid.ravel()[len(panels) :]:
        axes.remove()
    return figure


@in_house_style
def exchange_bars(exchanges: Sequence[ExchangeRow]) -> Figure:
    """Bytes up and down of each exchange, as means over the clients that took part.

    Args:
        exchanges: of a run; of many some are shown, the first and the last among them.
    """
    if not exchanges:
        return empty_picture("The ledger of this run is not there.")
    chosen = set(shown_exchanges([row.name for row in exchanges]))
    shown = [row for row in exchanges if row.name in chosen]
    figure = new_figure(0.32 * len(shown) + 0.75)
    left, right = figure.subplots(1, 2, sharey=True)
    names = [shorten(row.name, 24) for row in shown]
    _bars(left, names, [row.upload_bytes / max(row.num_clients, 1) for row in shown], format_bytes, [ACCENT])
    _bars(right, names, [row.download_bytes / max(row.num_clients, 1) for row in shown], format_bytes, [QUIET])
    left.set_title("upload per client", fontweight="normal")
    right.set_title("download per client", fontweight="normal")
    return figure


def _bars(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[float | None],
    written: Callable[[float | None], str],
    colours: Sequence[str],
) -> None:
    lengths = [value or 0.0 for value in values]
    axes.barh(range(len(names)), lengths, height=0.62, color=colours)
    axes.set_ylim(len(names) - 0.45, -0.55)
    # The numbers stand to the right of the bars, so the longest leaves room for its own.
    axes.set_xlim(0, max([*lengths, 1e-12]) * 1.55)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_yticks(range(len(names)), names)
    for row, (length, value) in enumerate(zip(lengths, values, strict=True)):
        axes.annotate(written(value), (length, row), (4, 0), textcoords="offset points", va="center", fontsize=9)
