"""Is one round enough: predicted and measured gap, the bound's terms, losses between models, and directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedfuse.report.diagnosis_reading import DiagnosedSetting
from fedfuse.report.plots.accuracy import percent_axis
from fedfuse.report.plots.style import (
    ACCENT,
    INK,
    PALETTE,
    QUIET,
    SECOND,
    WARN,
    category_ticks,
    empty_picture,
    in_house_style,
    new_figure,
)
from fedfuse.report.units import format_count, in_words, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TERMS = {
    "product": "the bound: L τ Tk m |w0|",
    "smoothness": "L, smoothness",
    "update_size": "τ, relative update",
    "num_steps": "Tk, local steps",
    "num_clients": "m, clients",
    "start_length": "|w0|",
}
_MOST_LINES = 8
_STYLES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))


@dataclass(frozen=True)
class _Line:
    """The settings that one line leads over.

    Args:
        name: what they have in common that others have not; empty where there is one line.
        settings: one per place of the axis, ``None`` where there is none.
        style: of the line.
    """

    name: str
    settings: Sequence[DiagnosedSetting | None]
    style: Any

    def values(self, read: Callable[[DiagnosedSetting], float | None]) -> list[float]:
        """One number per place; NaN where nobody knows.

        Args:
            read: of a setting.
        """
        found = [None if setting is None else read(setting) for setting in self.settings]
        return [float("nan") if value is None else value for value in found]

    def titled(self, what: str) -> str:
        """A quantity with what this line is about.

        Args:
            what: the quantity.
        """
        return f"{what}, {shorten(self.name, 24)}" if self.name else what


@in_house_style
def gap_over_settings(settings: Sequence[DiagnosedSetting], near: float, far: float) -> Figure:
    """Predicted and measured gap, what it costs in accuracy, and the bound's terms, over one varied setting.

    The setting along the axis is the first that changes the model's size, else the first; a line each for the choices
    of the others.

    Args:
        settings: usually models of several sizes, the smallest first.
        near: predicted gaps up to here count as near.
        far: predicted gaps from here on count as far.
    """
    if not settings:
        return empty_picture("No setting was diagnosed.")
    ticks, lines = _lines(settings)
    has_accuracy = any("accuracy_gap" in setting.measured for setting in settings)
    top = ["gap", "accuracy"] if has_accuracy else ["gap"]
    # The terms are shown relative to the first setting: for one alone there is nothing to see.
    rows: list[Any] = [top, ["terms"] * len(top)] if len(ticks) > 1 else [top]
    figure = new_figure(3.2 * len(rows) + 0.35 * len(lines))
    panels = figure.subplot_mosaic(rows)
    _gaps(panels["gap"], lines, near, far)
    if has_accuracy:
        _accuracy(panels["accuracy"], lines)
    if "terms" in panels:
        _terms(panels["terms"], lines[0])
    for axes in panels.values():
        axes.grid(axis="y")
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set_xlim(-0.4, len(ticks) - 0.6)
    return figure


@in_house_style
def loss_between(setting: DiagnosedSetting) -> Figure:
    """The validation loss from the first weights to the mean, and from client to client.

    Args:
        setting: of a diagnosis.
    """
    if not setting.lines:
        return empty_picture("No loss was measured between models.")
    downhill, between = setting.lines[0], setting.lines[1:][:_MOST_LINES]
    figure = new_figure(3.1)
    panels = figure.subplots(1, 2 if between else 1, sharey=True, squeeze=False)[0]
    panels[0].plot(downhill.places, downhill.losses, color=ACCENT, marker="o", ms=5)
    panels[0].set_xticks([0, 1], ["first weights", "mean"])
    panels[0].set_ylabel("validation loss")
    if between:
        for index, line in enumerate(between):
            color = PALETTE[index % len(PALETTE)]
            panels[1].plot(line.places, line.losses, color=color, marker="o", ms=4, label=f"{line.start} – {line.end}")
        panels[1].set_xticks([0, 1], ["one client", "another"])
        panels[1].legend(fontsize=8.5, labelcolor=INK)
    for axes in panels:
        axes.grid(axis="y")
    return figure


@in_house_style
def update_cosines(setting: DiagnosedSetting) -> Figure:
    """The cosine between each two clients' updates.

    Args:
        setting: of a diagnosis.
    """
    if len(setting.clients) < 2:
        return empty_picture("There is one client, and nothing to compare its update with.")
    side_in = min(5.2, 1.2 + 0.42 * len(setting.clients))
    figure = new_figure(side_in, side_in + 1.4)
    axes = figure.subplots()
    image = axes.imshow(setting.cosines, cmap="RdBu", vmin=-1, vmax=1)
    cell_in = (side_in - 1.0) / len(setting.clients)
    for side in ("x", "y"):
        category_ticks(axes, side, setting.clients, cell_in)
    if len(setting.clients) <= 8:
        for row, line in enumerate(setting.cosines):
            for column, value in enumerate(line):
                color = "#ffffff" if abs(value) > 0.6 else "#1f2a37"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    bar = figure.colorbar(image, ax=axes, shrink=0.85)
    bar.outline.set_visible(False)
    return figure


def _lines(settings: Sequence[DiagnosedSetting]) -> tuple[list[str], list[_Line]]:
    """Names of the places along the axis, and the lines over them."""
    keys = list(settings[0].varied)
    along = next((key for key in keys if _changes_size(settings, key)), keys[0] if keys else "")
    places: dict[str, DiagnosedSetting] = {}
    groups: dict[str, dict[str, DiagnosedSetting]] = {}
    for setting in settings:
        place = in_words({along: setting.varied[along]}) if along in setting.varied else ""
        rest = in_words({key: value for key, value in setting.varied.items() if key != along})
        places.setdefault(place, setting)
        groups.setdefault(rest, {})[place] = setting
    shown = list(groups.items())[: len(_STYLES)]
    lines = [
        _Line(name, [group.get(place) for place in places], style)
        for (name, group), style in zip(shown, _STYLES, strict=False)
    ]
    return [_tick(place, setting) for place, setting in places.items()], lines


def _changes_size(settings: Sequence[DiagnosedSetting], key: str) -> bool:
    """Whether the number of trained numbers changes with a setting and with nothing else."""
    sizes: dict[str, set[float | None]] = {}
    for setting in settings:
        sizes.setdefault(str(setting.varied.get(key)), set()).add(setting.numbers.get("num_parameters"))
    return all(len(found) == 1 for found in sizes.values()) and len(set().union(*sizes.values())) > 1


def _draw(axes: Axes, line: _Line, values: Sequence[float], color: str, marker: str, label: str) -> None:
    axes.plot(
        range(len(values)), values, color=color, marker=marker, ms=5, linestyle=line.style, label=line.titled(label)
    )


def _dots(axes: Axes, line: _Line, color: str, read: Callable[[DiagnosedSetting], Sequence[float]]) -> None:
    """The single seeds."""
    for place, setting in enumerate(line.settings):
        seeds = [] if setting is None else read(setting)
        axes.plot([place] * len(seeds), seeds, ".", color=color, alpha=0.5, ms=4)


def _gaps(axes: Axes, lines: Sequence[_Line], near: float, far: float) -> None:
    axes.axhline(near, color=QUIET, linewidth=0.9, linestyle=(0, (2, 2)))
    axes.axhline(far, color=WARN, linewidth=0.9, linestyle=(0, (2, 2)))
    for line in lines:
        _draw(axes, line, line.values(lambda s: s.numbers.get("predicted_gap")), ACCENT, "o", "predicted")
        _dots(axes, line, ACCENT, lambda s: s.predicted_gaps)
        measured = line.values(lambda s: s.measured_gap)
        if not all(math.isnan(value) for value in measured):
            _draw(axes, line, measured, SECOND, "s", "measured")
    axes.set_ylim(0, None)
    percent_axis(axes, "y")
    axes.set_title("distance to many rounds")
    _legend(axes, len(lines))


def _accuracy(axes: Axes, lines: Sequence[_Line]) -> None:
    for line in lines:
        _draw(axes, line, line.values(lambda s: s.measured.get("accuracy_one")), ACCENT, "o", "one round")
        _dots(axes, line, ACCENT, lambda s: s.measured_lists.get("accuracy_one_by_seed", ()))
        _draw(axes, line, line.values(lambda s: s.measured.get("accuracy_many")), SECOND, "s", "many rounds")
        _dots(axes, line, SECOND, lambda s: s.measured_lists.get("accuracy_many_by_seed", ()))
    percent_axis(axes, "y")
    axes.set_title("test accuracy")
    _legend(axes, len(lines))


def _terms(axes: Axes, line: _Line) -> None:
    """Each term over its value on the first setting, on a logarithmic axis."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    heights = []
    for index, (name, label) in enumerate(TERMS.items()):
        values = line.values(lambda s, name=name: s.numbers.get(name))  # type: ignore[misc]
        if not values[0] or math.isnan(values[0]):
            continue
        ratios = [math.log2(abs(value / values[0])) if value else float("nan") for value in values]
        heights += [ratio for ratio in ratios if math.isfinite(ratio)]
        style: dict[str, Any] = {"color": PALETTE[index % len(PALETTE)], "linewidth": 1.3}
        if name == "product":
            style = {"color": INK, "linewidth": 2.4}
        axes.plot(range(len(ratios)), ratios, marker="o", ms=4, label=label, **style)
    low, high = math.floor(min(heights, default=0) * 2), math.ceil(max(heights, default=0) * 2)
    step = max(1, -(-(high - low) // 6))
    axes.set_ylim(low / 2 - 0.15, high / 2 + 0.15)
    axes.yaxis.set_major_locator(FixedLocator([place / 2 for place in range(low, high + 1, step)]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda power, _: f"× {2**power:.2g}"))
    axes.set_title(line.titled("the bound's terms, relative to the first"))
    axes.legend(fontsize=8.5, labelcolor=INK, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _legend(axes: Axes, num_lines: int) -> None:
    # Long names stand below each other, and the panel keeps its width.
    columns = 2 if num_lines == 1 else 1
    axes.legend(
        fontsize=8, labelcolor=INK, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns, handlelength=2.6
    )


def _tick(place: str, setting: DiagnosedSetting) -> str:
    size = f"{format_count(setting.numbers.get('num_parameters'))} trained"
    return f"{shorten(place, 22)}\n{size}" if place else size
