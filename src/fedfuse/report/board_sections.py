"""What the page of a comparison shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from fedfuse.core.errors import ConfigError
from fedfuse.report import plots
from fedfuse.report.advice import SOURCE, advise, typical_constraints
from fedfuse.report.layout import Cell, Gallery, Part, Row, Section, SortableTable, cell
from fedfuse.report.plots.accuracy import pareto_front
from fedfuse.report.reading import Board, BoardRow, Run, read_run
from fedfuse.report.shared_sections import (
    DRAWN_TEXT,
    EXCHANGE_COLUMNS,
    client_picture,
    confusion_picture,
    curve_pictures,
    drawn_pictures,
    exchange_rows,
    holdings_section,
    journal_words,
    made_pictures,
    origin_sections,
)
from fedfuse.report.units import DASH, format_bytes, format_count, format_seconds, shorten
from fedfuse.report.wording import UPPER_BOUND, base_name, leader, method_title, metric_cell, metric_name, score

FirstRuns = Sequence[tuple[BoardRow, Run]]

MOST_DETAILED = 12
MOST_EXCHANGES = 6
COST_COLUMNS = (
    "method",
    "accuracy",
    "upload",
    "download",
    "exchanges",
    "storage",
    "result",
    "client time",
    "server time",
    "memory",
)


def board_tiles(board: Board, runs: FirstRuns) -> list[tuple[str, str]]:
    """Name and value of the few numbers at the top of a comparison's page.

    Args:
        board: the comparison.
        runs: the methods' first runs.
    """
    best = leader(board.ranked)
    num_clients = max((len(run.clients) for _, run in runs), default=0)
    clocks = ("client_seconds", "server_seconds")
    seconds = [row.num_seeds * sum(row.costs.get(clock, 0.0) for clock in clocks) for row in board.rows]
    tiles = [
        (f"best: {shorten(method_title(best.method), 22)}" if best else "", score(best.accuracy) if best else DASH),
        ("its client upload", format_bytes(best.costs.get("upload_bytes")) if best else DASH),
        ("method" if len(board.rows) == 1 else "methods", str(len(board.rows))),
        ("seed" if len(board.seeds) == 1 else "seeds", str(len(board.seeds)) if board.seeds else DASH),
        ("clients", str(num_clients) if num_clients else DASH),
        ("compute time", format_seconds(sum(seconds)) if any(seconds) else DASH),
    ]
    return [(name, value) for name, value in tiles if value != DASH]


def board_sections(board: Board, runs: FirstRuns, folder: Path, gallery: Gallery) -> list[Section]:
    """The sections of a comparison's page.

    Args:
        board: the comparison.
        runs: the methods' first runs.
        folder: of the comparison.
        gallery: where pictures go.
    """
    sections: list[Section | None] = []
    if runs:
        seed = f"Shown for seed {runs[0][1].seed}." if len(board.seeds) > 1 else ""
        sections.append(holdings_section(runs[0][1], gallery, seed))
    scored = [row for row in board.ranked if row.accuracy is not None]
    if scored:
        words = "; ".join(f"{method_title(row.method)} {score(row.accuracy, _spread(row))}" for row in scored)
        figure = plots.accuracy_by_method(board.rows)
        many = any(row.num_seeds > 1 for row in scored)
        text = "Small dots are single seeds." if many else "One seed, so the spread is not known."
        if any(base_name(row.method) in UPPER_BOUND for row in scored):
            text += " A ring is a bound, not a federated method."
        picture = gallery.hang("accuracy", figure, f"Test accuracy of each method: {words}.")
        sections.append(Section("accuracy", "Accuracy of each method", text, [picture]))
    for cost in ("upload_bytes", "server_seconds"):
        if len([row for row in scored if cost in row.costs]) > 1:
            sections.append(_against_cost(board, cost, gallery))
    drawn = [picture for row, run in runs for picture in drawn_pictures(run, gallery, method_title(row.method))]
    if drawn:
        sections.append(Section("drawn", "What the models draw", DRAWN_TEXT, drawn))
    if runs:
        sections.append(_by_method(board, runs, gallery))
    if board.rows:
        sections.append(_board_costs(board, folder, gallery))
    sections.append(_board_left(runs))
    text = "That of the first method; each run's folder holds its own."
    sections += origin_sections(board.config, board.versions, text)
    sections.append(advice_section(board))
    return [section for section in sections if section is not None]


def first_runs(board: Board, folder: Path) -> FirstRuns:
    """Each method's first run that can be read, the most accurate method first; methods without one are left out.

    Args:
        board: the comparison.
        folder: of the comparison; runs outside it are not read.
    """
    return [(row, run) for row in board.ranked if (run := _first_run(row, folder)) is not None]


def _first_run(row: BoardRow, folder: Path) -> Run | None:
    for name in row.runs:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            continue
        try:
            return read_run(folder / name)
        except ConfigError:
            continue
    return None


def advice_section(board: Board) -> Section | None:
    """Which method to choose under three typical constraints; nothing where no method was scored.

    Args:
        board: the comparison.
    """
    if not any(row.accuracy is not None for row in board.rows):
        return None
    facts = [
        (constraints.in_words(), " ".join(advise(board, constraints))) for constraints in typical_constraints(board)
    ]
    text = f"{SOURCE} Other constraints: fedfuse advise."
    return Section("advice", "Which method to choose", text, facts=facts)


def _against_cost(board: Board, cost: str, gallery: Gallery) -> Section:
    upload = cost == "upload_bytes"
    front = [method_title(row.method) for row in pareto_front(board.rows, cost)]
    words = "upload per client" if upload else "computing time of the server"
    described = f"Accuracy against {words}. Not beaten in both: {', '.join(front)}."
    name = f"accuracy-against-{'upload' if upload else 'server-time'}"
    picture = gallery.hang(name, plots.accuracy_against_cost(board.rows, cost), described)
    cheaper = "bytes" if upload else "time"
    text = f"Up and to the left is better. No method beats those on the line in both accuracy and {cheaper}."
    if not upload:
        text += " Clients' own training is not counted here."
    title = "Accuracy against what a client uploads" if upload else "Accuracy against what the server computes"
    return Section("upload" if upload else "server-time", title, text, [picture])


def _by_method(board: Board, runs: FirstRuns, gallery: Gallery) -> Section:
    best = leader(board.ranked)
    opened = best if any(row is best for row, _ in runs) else runs[0][0]
    parts = []
    for row, run in runs[:MOST_DETAILED]:
        pictures = []
        if run.clients or run.missing:
            pictures.append(client_picture(run, gallery, f"clients-{row.method}"))
        if run.confusion:
            pictures.append(confusion_picture(run, gallery, f"confusion-{row.method}"))
        pictures += made_pictures(run, gallery)
        if row is opened:
            pictures += curve_pictures(run, gallery, f"curves-{row.method}")
        text = f"{score(run.accuracy)}{f' · seed {run.seed}' if run.seed and row.num_seeds > 1 else ''}"
        parts.append(Part(method_title(row.method), text, pictures, row is opened))
    text = "Clients, confusion matrix and, for the method that is open, learning curves."
    if len(runs) > MOST_DETAILED:
        text += f" The {MOST_DETAILED} most accurate are shown."
    return Section("methods", "Method by method", text, parts=parts)


def _board_costs(board: Board, folder: Path, gallery: Gallery) -> Section:
    best = leader(board.ranked)
    scores = sorted({name for row in board.rows for name in row.metrics})
    rows = []
    for row in board.ranked:
        costs = row.costs
        cells = [
            # A long label may break before its settings.
            Cell(shorten(method_title(row.method), 48).replace("[", "\u200b[")),
            Cell(score(row.accuracy, _spread(row)), "" if row.accuracy is None else repr(row.accuracy)),
            *(Cell(metric_cell(name, row), repr(row.metrics.get(name, ""))) for name in scores),
            cell(costs.get("upload_bytes"), format_bytes),
            cell(costs.get("download_bytes"), format_bytes),
            cell(costs.get("exchanges"), format_count),
            cell(costs.get("storage_bytes"), format_bytes),
            cell(costs.get("artifact_bytes"), format_bytes),
            cell(costs.get("client_seconds"), format_seconds),
            cell(costs.get("server_seconds"), format_seconds),
            cell(costs.get("peak_rss_bytes"), format_bytes),
        ]
        rows.append(Row(cells, row is best, _link(row, folder)))
    pictures = []
    if len(board.rows) > 1:
        described = "Bytes and seconds of each method; the table holds the numbers."
        pictures.append(gallery.hang("costs", plots.cost_bars(board.ranked), described))
    text = "Upload and download are per client, client time is of all clients together. A click on a heading sorts."
    columns = (*COST_COLUMNS[:2], *map(metric_name, scores), *COST_COLUMNS[2:])
    return Section("costs", "What each method costs", text, pictures, SortableTable(columns, rows, sorted_by=1))


def _board_left(runs: FirstRuns) -> Section | None:
    rows = [line for row, run in runs for line in exchange_rows(run, MOST_EXCHANGES, f"{method_title(row.method)}: ")]
    if not rows:
        return None
    text = journal_words([run for _, run in runs])
    return Section("left", "What left the clients", text, table=SortableTable(EXCHANGE_COLUMNS, rows))


def _link(row: BoardRow, folder: Path) -> str:
    """Address of the first run's own page, if it has one inside this folder."""
    page = f"{row.runs[0]}/report.html" if row.runs else ""
    inside = bool(page) and (folder / page).resolve().is_relative_to(folder.resolve())
    return quote(page) if inside and (folder / page).is_file() else ""


def _spread(row: BoardRow) -> float | None:
    return row.spread if row.num_seeds > 1 else None
