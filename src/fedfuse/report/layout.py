"""The parts that the page is put together from."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fedfuse.report.inline import inline_svg
from fedfuse.report.plots import save_figure

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Args:
        text: what is read.
        value: what is sorted by; empty sorts last.
    """

    text: str
    value: str = ""


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Args:
        cells: one per column.
        best: whether it stands out.
        link: address that the first cell leads to; may be empty.
    """

    cells: Sequence[Cell]
    best: bool = False
    link: str = ""


@dataclass(frozen=True)
class SortableTable:
    """A table that the reader can sort by any column.

    Args:
        columns: their names.
        rows: in their first order.
        sorted_by: position of the column that the first order falls by; -1 for none.
    """

    columns: Sequence[str]
    rows: Sequence[Row]
    sorted_by: int = -1


@dataclass(frozen=True)
class Part:
    """A part of a section that the reader can fold.

    Args:
        title: its name.
        text: a few words beside it.
        pictures: SVG elements.
        open: whether it is open at first.
    """

    title: str
    text: str
    pictures: Sequence[Markup]
    open: bool = False


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Args:
        key: its id on the page.
        title: its heading.
        text: what to know before looking.
        pictures: SVG elements.
        table: may be sorted.
        facts: names and values.
        code: shown as it is.
        parts: may be folded.
    """

    key: str
    title: str
    text: str = ""
    pictures: Sequence[Markup] = ()
    table: SortableTable | None = None
    facts: Sequence[tuple[str, str]] = ()
    code: str = ""
    parts: Sequence[Part] = ()


@dataclass
class Gallery:
    """Saves pictures and makes them part of the page.

    Args:
        folder: for the files.
    """

    folder: Path
    _names: set[str] = field(default_factory=set)

    def hang(self, name: str, figure: Figure, description: str) -> Markup:
        """Save a picture and return it for the page.

        Args:
            name: of the files; made safe, and unique by a number at its end.
            figure: the picture.
            description: what a reader who cannot see it is told.
        """
        from markupsafe import Markup

        safe = re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")[:60] or "picture"
        unique, count = safe, 1
        while unique in self._names:
            unique, count = f"{safe}-{count + 1}", count + 1
        self._names.add(unique)
        _, svg = save_figure(figure, self.folder, unique)
        # Safe: the element tree escapes every text and attribute that comes from data.
        return Markup(inline_svg(svg.read_text(encoding="utf-8"), unique, description))


def cell(value: float | None, written: Callable[[float | None], str]) -> Cell:
    """A number as a cell that is sorted by its value, not by its letters.

    Args:
        value: ``None`` where nobody knows.
        written: how it is read.
    """
    return Cell(written(value), "" if value is None else repr(value))
