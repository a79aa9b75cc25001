"""What the page of a run shows."""

from __future__ import annotations

from collections.abc import Sequence

from fedfuse.report import plots
from fedfuse.report.layout import Cell, Gallery, Row, Section, SortableTable
from fedfuse.report.plots.curves import shown_exchanges
from fedfuse.report.reading import Run
from fedfuse.report.shared_sections import (
    DRAWN_TEXT,
    EXCHANGE_COLUMNS,
    client_picture,
    client_words,
    confusion_picture,
    curve_pictures,
    drawn_pictures,
    exchange_rows,
    facts_of,
    holdings_section,
    journal_words,
    made_pictures,
    origin_sections,
)
from fedfuse.report.units import DASH, format_bytes, format_count, format_percent, format_seconds, number
from fedfuse.report.wording import metric, metric_name, privacy_facts, privacy_lines, score

MOST_EXCHANGES = 20
MOST_SUSPECTS = 100


def run_tiles(run: Run) -> list[tuple[str, str]]:
    """Name and value of the few numbers at the top of a run's page.

    Args:
        run: the run.
    """
    known = {client.name for client in run.clients} | set(run.missing)
    answered = len(known) - len(run.missing)
    costs = run.costs
    tiles = [
        ("mean accuracy" if run.personal else "test accuracy", score(run.accuracy)),
        ("attack success", format_percent(number(run.attack.get("success")))),
        *((metric_name(name), metric(name, value)) for name, value in sorted(run.metrics.items())),
        ("client upload", format_bytes(costs.get("upload_bytes"))),
        ("exchanges", format_count(costs.get("exchanges"))),
        ("clients", f"{answered} of {len(known)}" if run.missing else str(len(known)) if known else DASH),
        ("size of the result", format_bytes(costs.get("artifact_bytes"))),
        ("client time, all", format_seconds(costs.get("client_seconds"))),
    ]
    return [(name, value) for name, value in tiles if value != DASH]


def run_sections(run: Run, gallery: Gallery) -> list[Section]:
    """The sections of a run's page.

    Args:
        run: the run.
        gallery: where pictures go.
    """
    sections = [holdings_section(run, gallery)]
    if run.clients or run.missing:
        picture = client_picture(run, gallery, "clients")
        sections.append(Section("clients", "Client by client", client_words(run), [picture]))
    sections += [_suspects(run), _attack(run)]
    if run.confusion:
        text = "A row is a class, its cells say how its test examples were named: the diagonal is right."
        picture = confusion_picture(run, gallery, "confusion")
        sections.append(Section("confusion", "Which classes are confused", text, [picture]))
    curves = curve_pictures(run, gallery, "curves")
    if curves:
        text = "One line a client, one panel an exchange."
        exchanges = list(dict.fromkeys(curve.exchange for curve in run.curves))
        sections.append(Section("curves", "How the clients learnt", text + _drawn(exchanges), curves))
    drawn = drawn_pictures(run, gallery)
    if drawn:
        sections.append(Section("drawn", "What the model draws", DRAWN_TEXT, drawn))
    made = made_pictures(run, gallery)
    if made:
        text = "What the student learnt from, a class after another."
        sections.append(Section("made", "What the method made", text, made))
    costs = _cost_facts(run)
    if costs:
        sections.append(Section("costs", "What it cost", "Bytes are encoded sizes, as sent.", facts=costs))
    sections.append(_left(run, gallery))
    sections.append(_private(run))
    if run.facts:
        sections.append(Section("facts", "What the method reports", facts=facts_of(run.facts)))
    return [section for section in [*sections, *origin_sections(run.config, run.versions, "")] if section is not None]


def _suspects(run: Run) -> Section | None:
    if not run.suspects:
        return None
    shown = run.suspects[:MOST_SUSPECTS]
    rows = [Row([Cell(row.client), Cell(row.exchange), Cell(row.reason)]) for row in shown]
    text = (
        "Nobody was left out because of it: an honest client may be odd, and a careful attacker looks like everybody."
    )
    if len(shown) < len(run.suspects):
        text += f" These are the first {len(shown)} of {len(run.suspects)}."
    table = SortableTable(("client", "exchange", "what looks wrong"), rows)
    return Section("suspects", "Uploads that look wrong", text, table=table)


def _attack(run: Run) -> Section | None:
    if not run.attack:
        return None
    text = "Hostile clients of this simulation. Success is the share of test examples that get the label they want."
    return Section("attack", "Who attacked", text, facts=facts_of(run.attack))


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
    pictures = []
    if len(run.exchanges) > 1:
        described = "Bytes up and down of each exchange; the table holds the numbers."
        pictures.append(gallery.hang("exchanges", plots.exchange_bars(run.exchanges), described))
    text = journal_words([run]) + _drawn([row.name for row in run.exchanges])
    table = SortableTable(EXCHANGE_COLUMNS, exchange_rows(run, MOST_EXCHANGES))
    return Section("left", "What left the clients", text, pictures, table)


def _private(run: Run) -> Section | None:
    lines = privacy_lines(run)
    if not lines:
        return None
    return Section("privacy", "What was kept private", " ".join(lines), facts=privacy_facts(run))


def _drawn(exchanges: Sequence[str]) -> str:
    """Says so where a picture leaves exchanges out."""
    num_shown = len(shown_exchanges(exchanges))
    return f" Of {len(exchanges)} exchanges {num_shown} are drawn." if num_shown < len(exchanges) else ""
