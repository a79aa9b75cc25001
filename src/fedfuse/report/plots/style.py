"""The house style of all pictures, and how they are saved.

Pictures are made without pyplot: nothing stays open, no window system is touched, and a reader's own matplotlib
settings change nothing. Every colour below is also a CSS variable of the page, which is how the pictures follow its
dark mode; see :mod:`fedfuse.report.inline`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

from fedfuse.report.units import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#1f2a37", "#5b6776", "#dde3ea", "#ffffff"
ON_ACCENT = "#fefefe"
ACCENT, SECOND, QUIET, WARN = "#0072b2", "#e69f00", "#8fa3b8", "#d55e00"
# Okabe and Ito's palette, readable with every common kind of colour blindness; its yellow and black are too near to
# the page's light and dark ground.
PALETTE = (ACCENT, SECOND, "#009e73", "#cc79a7", "#56b4e9", WARN, "#7a5cc0", "#8a6d3b")

WIDTH_IN = 8.8
PNG_DPI = 144

STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": QUIET,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.labelpad": 7.0,
    "axes.labelsize": 10,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
    "figure.dpi": 96,
    "figure.facecolor": PAPER,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "savefig.facecolor": PAPER,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": QUIET,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 9.5,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.color": QUIET,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 9.5,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}

P = ParamSpec("P")


@contextmanager
def house_style(**overrides: Any) -> Iterator[None]:
    """Draw in the house style for a while, whatever the reader's matplotlib settings are.

    Args:
        overrides: further settings, with ``__`` for the dots in their names.
    """
    import matplotlib.style

    extra = {name.replace("__", "."): value for name, value in overrides.items()}
    with matplotlib.style.context({**STYLE, **extra}, after_reset=True), warnings.catch_warnings():
        # A class may be named in a script that the font lacks: the SVG keeps its letters, which the browser can show.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*missing.*")
        yield


def in_house_style(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Let a function that draws a picture do so in the house style.

    Args:
        draw: the function.
    """

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with house_style():
            return draw(*args, **kwargs)

    return drawn


def new_figure(height_in: float, width_in: float = WIDTH_IN) -> Figure:
    """An empty figure whose parts make room for each other.

    Args:
        height_in: in inches.
        width_in: in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, folder: Path, name: str) -> tuple[Path, Path]:
    """Write a figure as ``name.png`` and ``name.svg``; the same figure gives the same bytes.

    Args:
        figure: the figure.
        folder: where; made if it is not there.
        name: of the files, without an ending.

    Returns:
        The PNG's path and the SVG's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    with house_style(svg__hashsalt=f"fedfuse-{name}"):
        # Arranged once for both files: it takes longer than drawing.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        figure.savefig(png, dpi=PNG_DPI, metadata={"Software": None})
        figure.savefig(svg, metadata={"Date": None, "Creator": None, "Title": name})
    return png, svg


def category_ticks(
    axes: Axes, side: Literal["x", "y"], names: Sequence[str], cell_in: float, longest: int = 18
) -> None:
    """Name the cells 0, 1, 2 ... of an axis; long names lean, and where they are too many only some are written.

    Args:
        axes: where.
        side: which axis.
        names: one per cell.
        cell_in: width (x) or height (y) of a cell in inches.
        longest: most letters of a name.
    """
    texts = [shorten(name, longest) for name in names]
    step = max(1, -(-0.19 // cell_in)) if cell_in > 0 else 1
    step = next((nice for nice in (1, 2, 5, 10, 20, 25, 50, 100) if nice >= step), int(step))
    shown = range(0, len(texts), step)
    if side == "y":
        axes.set_yticks(list(shown), [texts[i] for i in shown])
        return
    widest = max((len(texts[i]) for i in shown), default=0) * 0.088 + 0.06
    leaning = widest > cell_in * step
    axes.set_xticks(
        list(shown),
        [texts[i] for i in shown],
        rotation=45 if leaning else 0,
        ha="right" if leaning else "center",
        rotation_mode="anchor" if leaning else "default",
    )


def empty_picture(reason: str) -> Figure:
    """A small figure that says why there is nothing to see.

    Args:
        reason: one sentence.
    """
    figure = new_figure(1.2)
    figure.text(0.5, 0.5, reason, ha="center", va="center", color=MUTED)
    return figure
