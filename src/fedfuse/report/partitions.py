"""Several ways to split the same data, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from fedfuse.core.errors import ConfigError
from fedfuse.report.plots.holdings import draw_holdings
from fedfuse.report.plots.style import MUTED, WIDTH_IN, category_ticks, in_house_style, new_figure
from fedfuse.report.units import shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS_A_ROW = 3
PANEL_IN = (WIDTH_IN - 0.6) / PANELS_A_ROW


@in_house_style
def partition_gallery(assignments: Mapping[str, np.ndarray]) -> Figure:
    """Who holds what under several partition schemes: a panel each, clients down, classes across.

    Args:
        assignments: examples by client and class, shape ``(num_clients, num_classes)``, by the scheme's name, which
            becomes the panel's title.

    Raises:
        ConfigError: there is no scheme, or a table is not one of counts by client and class.

    Example:
        >>> figure = partition_gallery({"iid": np.full((3, 4), 5), "one class each": 20 * np.eye(3, 4)})
        >>> [axes.get_title("left") for axes in figure.axes]
        ['iid', 'one class each']
    """
    if not assignments:
        raise ConfigError(
            "there is no partition to draw", where="partition_gallery", fix="give at least one table of counts"
        )
    tables = {name: np.asarray(table, dtype=float) for name, table in assignments.items()}
    for name, table in tables.items():
        if table.ndim != 2 or table.size == 0 or not np.isfinite(table).all() or table.min() < 0:
            raise ConfigError(
                f"not a table of counts by client and class: shape {table.shape}",
                where=f'partition_gallery, "{name}"',
                fix="give finite counts of at least 0, shape (num_clients, num_classes)",
            )
    columns = min(PANELS_A_ROW, len(tables))
    num_rows = -(-len(tables) // columns)
    # All panels are equally high, so that schemes can be compared by eye.
    height_in = min(2.8, max(1.2, 0.26 * max(len(table) for table in tables.values())))
    figure = new_figure(num_rows * (height_in + 0.62) + 0.35, PANEL_IN * columns + 0.6)
    panels = figure.subplots(num_rows, columns, squeeze=False).ravel()
    for panel, (name, table) in zip(panels, tables.items(), strict=False):
        num_clients, num_classes = table.shape
        draw_holdings(panel, table, (PANEL_IN - 0.4) / num_classes, height_in / num_clients)
        panel.set_title(shorten(name, 34))
        category_ticks(panel, "x", [str(k) for k in range(num_classes)], (PANEL_IN - 0.4) / num_classes)
        category_ticks(panel, "y", [str(k) for k in range(num_clients)], height_in / num_clients)
    for panel in panels[len(tables) :]:
        panel.remove()
    figure.supxlabel("class", fontsize=10, color=MUTED)
    figure.supylabel("client", fontsize=10, color=MUTED)
    return figure
