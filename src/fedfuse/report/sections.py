"""The parts of the page: which pictures and tables a run or a comparison gets, and what is said of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from fedfuse.core.errors import ConfigError
from fedfuse.report import plots
from fedfuse.report.inline import inline_svg
from fedfuse.report.reading import Board, BoardRow, Run, read_run
from fedfuse.report.units import DASH, format_bytes, format_count, format_percent, format_seconds, number, shorten
from fedfuse.report.wording import UPPER_BOUND, base_name, method_title, score

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

MOST_DETAILED = 12
MOST_EXCHANGES = 12


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
        _, svg = plots.save_figure(figure, self.folder, unique)
        # Safe: the element tree escapes every text and attribute that comes from data.
        return Markup(inline_svg(svg.read_text(encoding="utf-8"), unique, description))


def run_tiles(run: Run) -> list[tuple[str, str]]:
    """Name and value of the few numbers at the top of a run's page.

    Args:
        run: the run.
    """
    known = {client.name for client in run.clients} | set(run.missing)
    answered = len(known) - len(run.missing)
    costs = run.costs
    tiles = [
        ("mean test accuracy" if run.personal else "test accuracy", score(run.accuracy)),
        ("uploaded per client", format_bytes(costs.get("upload_bytes"))),
        ("exchanges", format_count(costs.get("exchanges"))),
        ("clients", f"{answered} of {len(known)}" if run.missing else str(len(known)) if known else DASH),
        ("size of the result", format_bytes(costs.get("artifact_bytes"))),
        ("client time, summed", format_seconds(costs.get("client_seconds"))),
    ]
    return [(name, value) for name, value in tiles if value != DASH]


def board_tiles(board: Board, folder: Path) -> list[tuple[str, str]]:
    """Name and value of the few numbers at the top of a comparison's page.

    Args:
        board: the comparison.
        folder: of the comparison.
    """
    best = _best(board)
    first = next((run for row in board.rows if (run := first_run(row, folder)) is not None), None)
    seconds = [
        row.num_seeds * sum(row.costs.get(key, 0.0) for key in ("client_seconds", "server_seconds"))
        for row in board.rows
    ]
    tiles = [
        (f"best: {shorten(method_title(best.method), 22)}" if best else "", score(best.accuracy) if best else DASH),
        ("its upload per client", format_bytes(best.costs.get("upload_bytes")) if best else DASH),
        ("methods", str(len(board.rows))),
        ("seeds", str(len(board.seeds)) if board.seeds else DASH),
        ("clients", str(len(first.clients)) if first and first.clients else DASH),
        ("compute time of all", format_seconds(sum(seconds)) if any(seconds) else DASH),
    ]
    return [(name, value) for name, value in tiles if value != DASH]


def run_sections(run: Run, gallery: Gallery) -> list[Section]:
    """The sections of a run's page.

    Args:
        run: the run.
        gallery: where pictures go.
    """
    sections = [_holdings(run, gallery)]
    if run.clients or run.missing:
        sections.append(
            Section("clients", "Client by client", _client_words(run), [_client_picture(run, gallery, "clients")])
        )
    if run.confusion:
        text = "A row is a class, its cells say how its test examples were named: the diagonal is right."
        sections.append(
            Section("confusion", "Which classes are confused", text, [_confusion_picture(run, gallery, "confusion")])
        )
    curves = _curve_pictures(run, gallery, "curves")
    if curves:
        sections.append(
            Section("curves", "How the clients learnt", "One line a client, one panel an exchange.", curves)
        )
    sections += [
        Section("costs", "What it cost", "Bytes are encoded sizes, as sent.", facts=_cost_facts(run)),
        _left(run, gallery),
    ]
    if run.facts:
        sections.append(Section("facts", "What the method reports", facts=_facts(run.facts)))
    return [section for section in [*sections, *_origin(run.config, run.versions, "")] if section is not None]


def board_sections(board: Board, folder: Path, gallery: Gallery) -> list[Section]:
    """The sections of a comparison's page.

    Args:
        board: the comparison.
        folder: of the comparison; runs are read from folders inside it.
        gallery: where pictures go.
    """
    runs = [(row, run) for row in board.ranked if (run := first_run(row, folder)) is not None]
    sections: list[Section | None] = []
    if runs:
        seed = f"Shown for seed {runs[0][1].seed}." if len(board.seeds) > 1 else ""
        sections.append(_holdings(runs[0][1], gallery, seed))
    scored = [row for row in board.ranked if row.accuracy is not None]
    if scored:
        words = "; ".join(f"{method_title(row.method)} {score(row.accuracy, _spread(row))}" for row in scored)
        figure = plots.accuracy_by_method(board.rows)
        bound = (
            " A ring is a bound, not a federated method."
            if any(base_name(row.method) in UPPER_BOUND for row in scored)
            else ""
        )
        many = any(row.num_seeds > 1 for row in scored)
        text = "Small dots are single seeds." if many else "One seed, so the spread is not known."
        picture = gallery.hang("accuracy", figure, f"Test accuracy of each method: {words}.")
        sections.append(Section("accuracy", "Accuracy of each method", text + bound, [picture]))
    if len([row for row in scored if "upload_bytes" in row.costs]) > 1:
        sections.append(_against_upload(board, gallery))
    if runs:
        sections.append(_by_method(board, runs, gallery))
    sections.append(_board_costs(board, folder, gallery))
    sections.append(_board_left(runs))
    sections += _origin(board.config, board.versions, "That of the first method; each run's folder holds its own.")
    return [section for section in sections if section is not None]


def first_run(row: BoardRow, folder: Path) -> Run | None:
    """The first run of a method that can be read; ``None`` if none can.

    Args:
        row: of a board.
        folder: of the comparison; runs outside it are not read.
    """
    for name in row.runs:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            continue
        try:
            return read_run(folder / name)
        except ConfigError:
            continue
    return None


def _holdings(run: Run, gallery: Gallery, text: str = "") -> Section | None:
    counts = {client.name: client.label_counts for client in run.clients if client.label_counts}
    if not counts:
        return None
    totals = [sum(row) for row in counts.values()]
    described = (
        f"Training examples of {len(counts)} clients over {len(run.class_names)} classes; "
        f"a client holds {format_count(min(totals))} to {format_count(max(totals))}."
    )
    picture = gallery.hang("who-holds-what", plots.who_holds_what(counts, run.class_names), described)
    return Section("holdings", "Who holds what", " ".join(part for part in (described, text) if part), [picture])


def _client_words(run: Run) -> str:
    scores = [client.accuracy for client in run.clients if client.accuracy is not None]
    text = "" if not scores else f"Accuracies run from {format_percent(min(scores))} to {format_percent(max(scores))}."
    reasons = "; ".join(f"{name}: {shorten(reason, 160)}" for name, reason in list(run.missing.items())[:8])
    more = f" and {len(run.missing) - 8} more" if len(run.missing) > 8 else ""
    return f"{text} {f'Without an answer: {reasons}{more}.' if reasons else ''}".strip()


def _client_picture(run: Run, gallery: Gallery, name: str) -> Markup:
    described = (
        f"Accuracy and number of training examples of each client of {method_title(run.method)}. {_client_words(run)}"
    )
    # The mean of the clients' own models is no fused model's accuracy, but as a line it says the same: where they stand.
    return gallery.hang(name, plots.client_bars(run.clients, run.missing, run.accuracy), described)


def _confusion_picture(run: Run, gallery: Gallery, name: str) -> Markup:
    shares = [
        (row[index] / sum(row), run.class_names[index]) for index, row in enumerate(run.confusion) if sum(row) > 0
    ]
    worst = f" The hardest class is {min(shares)[1]}, right in {format_percent(min(shares)[0])}." if shares else ""
    described = f"Confusion matrix of {method_title(run.method)} over {len(run.confusion)} classes.{worst}"
    return gallery.hang(name, plots.confusion_matrix(run.confusion, run.class_names), described)


def _curve_pictures(run: Run, gallery: Gallery, name: str) -> list[Markup]:
    kinds = sorted({curve.name for curve in run.curves}, key=lambda kind: (kind != "train_loss", "loss" in kind, kind))
    return [
        gallery.hang(
            f"{name}-{kind}", plots.learning_curves(run.curves, kind), f"Curves of {kind} by client and exchange."
        )
        for kind in kinds[:3]
    ]


def _cost_facts(run: Run) -> list[tuple[str, str]]:
    costs = run.costs
    facts = [
        ("uploaded per client", format_bytes(costs.get("upload_bytes"))),
        ("uploaded by all clients", format_bytes(costs.get("upload_bytes_total"))),
        ("downloaded per client", format_bytes(costs.get("download_bytes"))),
        ("downloaded by all clients", format_bytes(costs.get("download_bytes_total"))),
        ("exchanges", format_count(costs.get("exchanges"))),
        ("server storage, peak", format_bytes(costs.get("storage_bytes"))),
        ("size of the result", format_bytes(costs.get("artifact_bytes"))),
        ("parameters of the result", format_count(number(run.artifact.get("num_parameters")))),
        ("client time, all clients", format_seconds(costs.get("client_seconds"))),
        ("server time", format_seconds(costs.get("server_seconds"))),
        ("memory of a process, peak", format_bytes(costs.get("peak_rss_bytes"))),
        ("digest of the result", str(run.artifact.get("digest") or DASH)),
    ]
    return [(name, value) for name, value in facts if value != DASH]


def _left(run: Run, gallery: Gallery) -> Section | None:
    if not run.exchanges:
        return None
    rows = _exchange_rows(run)
    picture = (
        [gallery.hang("exchanges", plots.exchange_bars(run.exchanges), "Bytes up and down of each exchange.")]
        if len(run.exchanges) > 1
        else []
    )
    return Section(
        "left", "What left the clients", _journal_words([run]), picture, SortableTable(EXCHANGE_COLUMNS, rows)
    )


EXCHANGE_COLUMNS = ("exchange", "clients", "upload per client", "download per client", "upload, all", "client time")


def _exchange_rows(run: Run, prefix: str = "") -> list[Row]:
    rows = [
        Row(
            [
                Cell(prefix + shorten(row.name, 60)),
                Cell(str(row.num_clients), str(row.num_clients)),
                _cell(row.upload_bytes / max(row.num_clients, 1), format_bytes),
                _cell(row.download_bytes / max(row.num_clients, 1), format_bytes),
                _cell(row.upload_bytes, format_bytes),
                _cell(row.seconds, format_seconds),
            ]
        )
        for row in run.exchanges[:MOST_EXCHANGES]
    ]
    rest = run.exchanges[MOST_EXCHANGES:]
    if rest:
        uploaded, clients = sum(row.upload_bytes for row in rest), max(row.num_clients for row in rest)
        rows.append(
            Row(
                [
                    Cell(f"{prefix}… and {len(rest)} more, together"),
                    Cell(str(clients), str(clients)),
                    _cell(sum(row.upload_bytes / max(row.num_clients, 1) for row in rest), format_bytes),
                    _cell(sum(row.download_bytes / max(row.num_clients, 1) for row in rest), format_bytes),
                    _cell(uploaded, format_bytes),
                    _cell(sum(row.seconds for row in rest), format_seconds),
                ]
            )
        )
    return rows


def _journal_words(runs: Sequence[Run]) -> str:
    reused = sum(row.num_from_journal for run in runs for row in run.exchanges)
    text = "Everything that crossed, by encoded size; nothing else left a client."
    if reused:
        text += f" {format_count(reused)} answers were already in the journal, and count as if they had been given now."
    return text


def _against_upload(board: Board, gallery: Gallery) -> Section:
    front = plots_front(board)
    described = f"Accuracy against upload per client. Not beaten in both: {', '.join(front)}."
    picture = gallery.hang("accuracy-against-upload", plots.accuracy_against_upload(board.rows), described)
    text = "Up and to the left is better. No method beats those on the line in both accuracy and bytes."
    return Section("upload", "Accuracy against what a client uploads", text, [picture])


def plots_front(board: Board) -> list[str]:
    """Titles of the methods that no other beats in both accuracy and upload.

    Args:
        board: the comparison.
    """
    from fedfuse.report.plots.accuracy import pareto_front

    return [method_title(row.method) for row in pareto_front(board.rows)]


def _by_method(board: Board, runs: Sequence[tuple[BoardRow, Run]], gallery: Gallery) -> Section:
    best = _best(board)
    opened = best if any(row is best for row, _ in runs) else runs[0][0]
    parts = []
    for row, run in runs[:MOST_DETAILED]:
        pictures = []
        if run.clients or run.missing:
            pictures.append(_client_picture(run, gallery, f"clients-{row.method}"))
        if run.confusion:
            pictures.append(_confusion_picture(run, gallery, f"confusion-{row.method}"))
        if row is opened:
            pictures += _curve_pictures(run, gallery, f"curves-{row.method}")
        text = f"{score(run.accuracy)}{f' · seed {run.seed}' if run.seed and row.num_seeds > 1 else ''}"
        parts.append(Part(method_title(row.method), text, pictures, row is opened))
    text = "Clients, confusion matrix and, for the method that is open, learning curves."
    if len(runs) > MOST_DETAILED:
        text += f" The {MOST_DETAILED} most accurate are shown."
    return Section("methods", "Method by method", text, parts=parts)


def _board_costs(board: Board, folder: Path, gallery: Gallery) -> Section:
    best = _best(board)
    columns = ("method", "accuracy", "upload", "download", "exchanges", "storage", "result", "client time", "server time", "memory")  # fmt: skip
    rows = []
    for row in board.ranked:
        costs, link = row.costs, ""
        if row.runs and first_run(row, folder) is not None and (folder / row.runs[0] / "report.html").is_file():
            link = quote(f"{row.runs[0]}/report.html")
        cells = [
            Cell(method_title(row.method)),
            Cell(score(row.accuracy, _spread(row)), "" if row.accuracy is None else repr(row.accuracy)),
            _cell(costs.get("upload_bytes"), format_bytes),
            _cell(costs.get("download_bytes"), format_bytes),
            _cell(costs.get("exchanges"), format_count),
            _cell(costs.get("storage_bytes"), format_bytes),
            _cell(costs.get("artifact_bytes"), format_bytes),
            _cell(costs.get("client_seconds"), format_seconds),
            _cell(costs.get("server_seconds"), format_seconds),
            _cell(costs.get("peak_rss_bytes"), format_bytes),
        ]
        rows.append(Row(cells, row is best, link))
    pictures = []
    if len(board.rows) > 1:
        pictures.append(
            gallery.hang(
                "costs", plots.cost_bars(board.ranked), "Bytes and seconds of each method; the table holds the numbers."
            )
        )
    text = "Upload and download are per client, client time is of all clients together. A click on a heading sorts."
    return Section("costs", "What each method costs", text, pictures, SortableTable(columns, rows, sorted_by=1))


def _board_left(runs: Sequence[tuple[BoardRow, Run]]) -> Section | None:
    rows = [line for row, run in runs for line in _exchange_rows(run, f"{method_title(row.method)}: ")]
    if not rows:
        return None
    text = _journal_words([run for _, run in runs])
    return Section("left", "What left the clients", text, table=SortableTable(EXCHANGE_COLUMNS, rows))


def _origin(config: Mapping[str, Any], versions: Mapping[str, Any], text: str) -> list[Section | None]:
    import yaml

    code = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=100) if config else ""
    return [
        Section("configuration", "Configuration", text, code=code) if code else None,
        Section("versions", "Versions", facts=_facts(versions)) if versions else None,
    ]


def _best(board: Board) -> BoardRow | None:
    scored = [row for row in board.ranked if row.accuracy is not None]
    return next((row for row in scored if base_name(row.method) not in UPPER_BOUND), scored[0] if scored else None)


def _spread(row: BoardRow) -> float | None:
    return row.spread if row.num_seeds > 1 else None


def _cell(value: float | None, written: Any) -> Cell:
    return Cell(written(value), "" if value is None else repr(value))


def _facts(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), _fact(value)) for name, value in table.items()]


def _fact(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return format_count(value)
    return shorten(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 300)
