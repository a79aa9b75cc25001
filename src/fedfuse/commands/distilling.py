"""What ``fedfuse distill`` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fedfuse.report.units import DASH, format_bytes, format_percent

if TYPE_CHECKING:
    from fedfuse.distilling import Distilled


def print_distilled(result: Distilled, console: Console | None = None) -> None:
    """Print teacher and student side by side.

    Args:
        result: what came out.
        console: where; the terminal if left out.
    """
    console = console or Console()
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for name in ("size", "accuracy", "agreement"):
        table.add_column(name, justify="right")
    for name, size, accuracy, agreement in (
        ("teacher", result.teacher_bytes, result.teacher_accuracy, None),
        ("student", result.student_bytes, result.student_accuracy, result.agreement),
    ):
        shown = DASH if agreement is None else format_percent(agreement)
        table.add_row(name, format_bytes(size), DASH if accuracy is None else format_percent(accuracy), shown)
    console.print(table)
    if result.num_held_out:
        console.print(f"measured on {result.num_held_out:,} held-out inputs", style="dim", highlight=False)
    for note in result.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
