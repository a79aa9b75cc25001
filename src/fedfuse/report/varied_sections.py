"""What the page of a comparison over several settings shows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from urllib.parse import quote

from fedfuse.report import plots
from fedfuse.report.advice import SOURCE, advise, typical_constraints
from fedfuse.report.layout import Cell, Gallery, Row, Section, SortableTable, cell
from fedfuse.report.reading import Board, BoardRow
from fedfuse.report.shared_sections import origin_sections
from fedfuse.report.units import format_bytes, format_percent, format_seconds, in_words, number, shorten
from fedfuse.report.wording import leader, method_title, metric_cell, metric_name, score


def varied_headline(board: Board) -> list[str]:
    """The result in plain words.

    Args:
        board: of a comparison whose settings were varied.

    Returns:
        Sentences, the one that matters most first.
    """
    leaders = [best for _, part in board.settings if (best := leader(part.rows)) is not None]
    if not leaders:
        return ["The methods ran without a test set, so there is no accuracy to compare."]
    counted = Counter(row.method for row in leaders)
    first, wins = counted.most_common(1)[0]
    many = len(board.settings)
    sentences = [f"{method_title(first)} is the most accurate in {wins} of {many} settings."]
    for label, times in counted.most_common()[1:4]:
        sentences.append(f"{method_title(label)} leads in {times}.")
    planned = 1
    for values in board.varied.values():
        planned *= len(values)
    if many < planned:
        sentences.append(f"{planned - many} of {planned} settings are not there yet: the same command continues.")
    return sentences


def varied_tiles(board: Board) -> list[tuple[str, str]]:
    """Name and value of the few numbers at the top of the page.

    Args:
        board: of a comparison whose settings were varied.
    """
    seconds = [
        row.num_seeds * (row.costs.get("client_seconds", 0.0) + row.costs.get("server_seconds", 0.0))
        for row in board.rows
    ]
    return [
        ("settings", str(len(board.settings))),
        ("methods", str(len({row.method for row in board.rows}))),
        ("seed" if len(board.seeds) == 1 else "seeds", str(len(board.seeds))),
        ("compute time", format_seconds(sum(seconds))),
    ]


def varied_sections(board: Board, folder: Path, gallery: Gallery) -> list[Section]:
    """The sections of the page.

    Args:
        board: of a comparison whose settings were varied.
        folder: of the comparison.
        gallery: where pictures go.
    """
    sections = []
    for key, values in board.varied.items():
        if len(values) < 2:
            continue
        short = key.rpartition(".")[2]
        figure = plots.accuracy_against_setting(board, key)
        described = f"Test accuracy of each method against {short}; the table holds the numbers."
        text = "Mean over seeds; a band is one standard deviation. Numbers stand on a logarithmic axis."
        picture = gallery.hang(f"accuracy-against-{short}", figure, described)
        sections.append(Section(f"against-{short}".replace("_", "-"), f"Accuracy against {short}", text, [picture]))
    sections.append(_table(board, folder))
    text = "That of the first method on the first setting; each run's folder holds its own."
    sections += [part for part in origin_sections(board.config, board.versions, text) if part is not None]
    facts = []
    for varied, part in board.settings:
        for constraints in typical_constraints(part):
            facts.append((f"{in_words(varied)}: {constraints.in_words()}", " ".join(advise(part, constraints))))
    if any(row.accuracy is not None for row in board.rows):
        text = f"{SOURCE} Other constraints: fedfuse advise."
        sections.append(Section("advice", "Which method to choose", text, facts=facts))
    return sections


def _table(board: Board, folder: Path) -> Section:
    best = {id(leader(part.rows)) for _, part in board.settings}
    attacked = any(row.attack_success is not None for row in board.rows)
    scores = sorted({name for row in board.rows for name in row.metrics})
    rows = []
    for row in board.rows:
        values = [row.varied.get(key) for key in board.varied]
        cells = [
            Cell(shorten(method_title(row.method), 48).replace("[", "\u200b[")),
            *(
                Cell(str(value), repr(found) if (found := number(value)) is not None else str(value))
                for value in values
            ),
            Cell(
                score(row.accuracy, row.spread if row.num_seeds > 1 else None),
                "" if row.accuracy is None else repr(row.accuracy),
            ),
            *([cell(row.attack_success, format_percent)] if attacked else []),
            *(Cell(metric_cell(name, row), repr(row.metrics.get(name, ""))) for name in scores),
            cell(row.costs.get("upload_bytes"), format_bytes),
            cell(row.costs.get("client_seconds"), format_seconds),
            cell(row.costs.get("server_seconds"), format_seconds),
        ]
        rows.append(Row(cells, id(row) in best, _link(row, folder)))
    names = [key.rpartition(".")[2] for key in board.varied]
    attack = ("attack success",) if attacked else ()
    columns = ("method", *names, "accuracy", *attack, *map(metric_name, scores), "upload", "client time", "server time")
    text = "The best of each setting stands out. A click on a heading sorts; a name leads to the setting's own page."
    return Section("settings", "All methods on all settings", text, table=SortableTable(columns, rows))


def _link(row: BoardRow, folder: Path) -> str:
    """Address of the page of the comparison that a row belongs to, if it is inside this folder."""
    page = f"{row.runs[0].partition('/')[0]}/report.html" if row.runs else ""
    inside = bool(page) and (folder / page).resolve().is_relative_to(folder.resolve())
    return quote(page) if inside and (folder / page).is_file() else ""
