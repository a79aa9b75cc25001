"""Tables for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fedfuse.report.reading import BoardRow, parse_board, parse_run
from fedfuse.report.suspects import suspect_lines
from fedfuse.report.units import format_bytes as format_bytes
from fedfuse.report.units import format_count, format_percent, in_words, number
from fedfuse.report.units import format_seconds as format_seconds
from fedfuse.report.wording import leader, metric, metric_cell, metric_name, privacy_lines, score

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = ("method", "accuracy", "upload", "download", "exchanges", "storage", "client time", "server time")
ATTACK_COLUMN = "attack success"
WIDE_COLUMNS = 110


def print_result(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the result of a run: its score and costs, then its clients.

    Args:
        result: as in ``result.json``.
        console: where; the terminal if left out.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    run = parse_run(result)
    facts = Table(show_header=False, box=None, pad_edge=False, title=escape(run.method), title_justify="left")
    facts.add_column(style="dim")
    facts.add_column(justify="right")
    # The accuracy is that of one model on the test set, or the mean over the clients' own models.
    facts.add_row("mean accuracy" if run.personal else "accuracy", f"[bold]{score(run.accuracy)}[/bold]")
    success = number(run.attack.get("success"))
    if success is not None:
        facts.add_row(ATTACK_COLUMN, format_percent(success))
    for name, value in sorted(run.metrics.items()):
        facts.add_row(metric_name(name), metric(name, value))
    facts.add_row("upload per client", format_bytes(run.costs.get("upload_bytes")))
    facts.add_row("download per client", format_bytes(run.costs.get("download_bytes")))
    facts.add_row("exchanges", format_count(run.costs.get("exchanges")))
    facts.add_row("server storage", format_bytes(run.costs.get("storage_bytes")))
    facts.add_row("size of the result", format_bytes(run.costs.get("artifact_bytes")))
    facts.add_row("client time", format_seconds(run.costs.get("client_seconds")))
    facts.add_row("server time", format_seconds(run.costs.get("server_seconds")))
    console.print(facts)
    if run.clients:
        kinds = sorted({client.accuracy_kind for client in run.clients if client.accuracy is not None})
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("client")
        table.add_column("examples", justify="right")
        table.add_column(escape(f"accuracy ({', '.join(kinds)})") if any(kinds) else "accuracy", justify="right")
        for client in run.clients:
            table.add_row(escape(client.name), format_count(client.num_examples), format_percent(client.accuracy))
        console.print()
        console.print(table)
    for line in privacy_lines(run):
        console.print(escape(line), highlight=False)
    for client_id, reason in run.missing.items():
        console.print(f"[yellow]{escape(client_id)} gave no answer: {escape(reason)}[/yellow]")
    for line in suspect_lines(run.suspects):
        console.print(f"[yellow]{escape(line)}[/yellow]")


def print_board(board: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a comparison, the most accurate method first; its accuracy is bold. Each setting has a table of its own.

    Args:
        board: as in ``board.json``.
        console: where; the terminal if left out.
    """
    from rich.console import Console

    console = console or Console()
    for varied, part in parse_board(board).settings:
        if varied:
            console.print(f"\n{in_words(varied)}", markup=False, highlight=False)
        _print_setting(part.ranked, console)


def _print_setting(rows: Sequence[BoardRow], console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    # In a narrow terminal both times become one column, so that no number is cut.
    narrow = console.width < WIDE_COLUMNS
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(COLUMNS[0], overflow="fold")
    for name in (*COLUMNS[1:-2], "time") if narrow else COLUMNS[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    more = more_columns(rows)
    for name in more:
        table.add_column(name, justify="right")
    best = leader(rows)
    for row in rows:
        cells = [escape(cell) for cell in board_cells(row)]
        if narrow:
            clocks = [row.costs[name] for name in ("client_seconds", "server_seconds") if name in row.costs]
            cells[-2:] = [format_seconds(sum(clocks) if clocks else None)]
        if row is best:
            cells[1] = f"[bold]{cells[1]}[/bold]"
        table.add_row(*cells, *(column(row) for column in more.values()))
    console.print(table)


def board_markdown(board: Mapping[str, Any]) -> str:
    """The table of a comparison in Markdown, the most accurate method first; its accuracy is bold.

    Each setting has a table of its own, under its values.

    Args:
        board: as in ``board.json``.

    Returns:
        The table, with a new line at its end.

    Example:
        >>> row = {"method": "fusefl", "accuracy_mean": 0.94, "num_seeds": 1, "upload_bytes": 1536, "exchanges": 5}
        >>> print(board_markdown({"rows": [row]}).splitlines()[2])
        | fusefl | **94.0 %** | 1.5 KiB | – | 5 | – | – | – |
    """
    parts = []
    for varied, part in parse_board(board).settings:
        heading = f"**{_escaped(in_words(varied))}**\n\n" if varied else ""
        parts.append(heading + _setting_markdown(part.ranked))
    return "\n".join(parts)


def _setting_markdown(rows: Sequence[BoardRow]) -> str:
    best = leader(rows)
    more = more_columns(rows)
    columns = (*COLUMNS, *more)
    lines = [f"| {' | '.join(columns)} |", f"|:---|{'---:|' * (len(columns) - 1)}"]
    for row in rows:
        cells = [_escaped(cell) for cell in board_cells(row)]
        if row is best:
            cells[1] = f"**{cells[1]}**"
        cells += [column(row) for column in more.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def more_columns(rows: Sequence[BoardRow]) -> dict[str, Callable[[BoardRow], str]]:
    """The columns that only some comparisons have: how far attacks came, and scores beside the accuracy.

    Args:
        rows: of a board.

    Returns:
        Heading to what gives a row's cell.
    """
    columns: dict[str, Callable[[BoardRow], str]] = {}
    if any(row.attack_success is not None for row in rows):
        columns[ATTACK_COLUMN] = lambda row: format_percent(row.attack_success)
    for name in sorted({name for row in rows for name in row.metrics}):
        columns[metric_name(name)] = partial(metric_cell, name)
    return columns


def board_cells(row: BoardRow) -> list[str]:
    """The cells of a method's line, in the order of :data:`COLUMNS`.

    Args:
        row: of a board.
    """
    return [
        row.method,
        score(row.accuracy, row.spread if row.num_seeds > 1 else None),
        format_bytes(row.costs.get("upload_bytes")),
        format_bytes(row.costs.get("download_bytes")),
        format_count(row.costs.get("exchanges")),
        format_bytes(row.costs.get("storage_bytes")),
        format_seconds(row.costs.get("client_seconds")),
        format_seconds(row.costs.get("server_seconds")),
    ]


def _escaped(cell: str) -> str:
    """A cell whose letters mean nothing to Markdown: a label may hold any."""
    line = " ".join(cell.split()).replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    for letter in "|*_`[]":
        line = line.replace(letter, f"\\{letter}")
    return line
