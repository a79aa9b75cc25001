"""Sections and pictures that the page of a run and that of a comparison have in common."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedfuse.core.errors import PayloadError
from fedfuse.core.payload import Payload
from fedfuse.report import plots
from fedfuse.report.layout import Cell, Gallery, Row, Section, cell
from fedfuse.report.reading import ExchangeRow, Run
from fedfuse.report.units import format_bytes, format_count, format_percent, format_seconds, shorten
from fedfuse.report.wording import method_title

if TYPE_CHECKING:
    from markupsafe import Markup

MOST_QUANTITIES = 3
DRAWN_TEXT = "By captions of the test part, a line for each class; every model starts from the same noise."
EXCHANGE_COLUMNS = ("exchange", "clients", "upload per client", "download per client", "upload, all", "client time")


def holdings_section(run: Run, gallery: Gallery, text: str = "") -> Section | None:
    """Who holds what; ``None`` where the run does not say.

    Args:
        run: the run.
        gallery: where the picture goes.
        text: said besides.
    """
    counts = {client.name: client.label_counts for client in run.clients if client.label_counts}
    if not counts:
        return None
    totals = [sum(row) for row in counts.values()]
    described = (
        f"Examples that {len(counts)} clients hold over {len(run.class_names)} classes; "
        f"a client holds {format_count(min(totals))} to {format_count(max(totals))}."
    )
    picture = gallery.hang("who-holds-what", plots.who_holds_what(counts, run.class_names), described)
    return Section("holdings", "Who holds what", " ".join(part for part in (described, text) if part), [picture])


def client_words(run: Run) -> str:
    """From where to where the clients' accuracies run, and why some clients gave no answer.

    Args:
        run: the run.
    """
    scores = [client.accuracy for client in run.clients if client.accuracy is not None]
    text = "" if not scores else f"Accuracies run from {format_percent(min(scores))} to {format_percent(max(scores))}."
    reasons = "; ".join(f"{name}: {shorten(reason, 160)}" for name, reason in list(run.missing.items())[:8])
    more = f" and {len(run.missing) - 8} more" if len(run.missing) > 8 else ""
    return f"{text} {f'Without an answer: {reasons}{more}.' if reasons else ''}".strip()


def client_picture(run: Run, gallery: Gallery, name: str) -> Markup:
    """Accuracy and size of each client.

    Args:
        run: the run.
        gallery: where the picture goes.
        name: of the picture.
    """
    title = method_title(run.method)
    described = f"Accuracy and number of training examples of each client of {title}. {client_words(run)}".strip()
    figure = plots.client_bars(run.clients, run.missing, run.accuracy, "mean" if run.personal else "test")
    return gallery.hang(name, figure, described)


def confusion_picture(run: Run, gallery: Gallery, name: str) -> Markup:
    """The confusion matrix.

    Args:
        run: the run.
        gallery: where the picture goes.
        name: of the picture.
    """
    lines = zip(run.confusion, run.class_names, strict=False)
    right = [(line[index] / sum(line), label) for index, (line, label) in enumerate(lines) if sum(line) > 0]
    worst = f" The hardest class is {min(right)[1]}, right in {format_percent(min(right)[0])}." if right else ""
    described = f"Confusion matrix of {method_title(run.method)} over {len(run.confusion)} classes.{worst}"
    return gallery.hang(name, plots.confusion_matrix(run.confusion, run.class_names), described)


def curve_pictures(run: Run, gallery: Gallery, name: str) -> list[Markup]:
    """Learning curves, a picture for each quantity: the training loss, then scores, then other losses.

    Args:
        run: the run.
        gallery: where the pictures go.
        name: the beginning of theirs.
    """
    kinds = sorted({curve.name for curve in run.curves}, key=lambda kind: (kind != "train_loss", "loss" in kind, kind))
    pictures = []
    for kind in kinds[:MOST_QUANTITIES]:
        described = f"{kind.replace('_', ' ')} over the epochs, by client and exchange."
        pictures.append(gallery.hang(f"{name}-{kind}", plots.learning_curves(run.curves, kind), described))
    return pictures


def exchange_rows(run: Run, most: int, prefix: str = "") -> list[Row]:
    """Lines of a table of exchanges, in order of asking; those of many rounds are summed up after the first.

    Args:
        run: the run.
        most: exchanges with a line of their own, at least 1.
        prefix: stands before each exchange's name.
    """
    shown, rest = run.exchanges[:most], run.exchanges[most:]
    rows = [_exchange_row(prefix + shorten(row.name, 60), [row]) for row in shown]
    return [*rows, _exchange_row(f"{prefix}… and {len(rest)} more, together", rest)] if rest else rows


def _exchange_row(name: str, exchanges: Sequence[ExchangeRow]) -> Row:
    return Row(
        [
            Cell(name),
            cell(max(row.num_clients for row in exchanges), format_count),
            cell(sum(row.upload_bytes / max(row.num_clients, 1) for row in exchanges), format_bytes),
            cell(sum(row.download_bytes / max(row.num_clients, 1) for row in exchanges), format_bytes),
            cell(sum(row.upload_bytes for row in exchanges), format_bytes),
            cell(sum(row.seconds for row in exchanges), format_seconds),
        ]
    )


def journal_words(runs: Sequence[Run]) -> str:
    """How bytes are counted, and how many answers were there already.

    Args:
        runs: those on the page.
    """
    text = "Everything that crossed, by encoded size."
    reused = sum(row.num_from_journal for run in runs for row in run.exchanges)
    if reused:
        answers = "1 answer was" if reused == 1 else f"{format_count(reused)} answers were"
        text += f" {answers} in the journal already and counted as if given now."
    return text


def origin_sections(config: Mapping[str, Any], versions: Mapping[str, Any], text: str) -> list[Section | None]:
    """The configuration as YAML, and the versions.

    Args:
        config: resolved; empty leaves its section out.
        versions: of the software; empty leaves its section out.
        text: said of the configuration.
    """
    import yaml

    code = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=100) if config else ""
    return [
        Section("configuration", "Configuration", text, code=code) if code else None,
        Section("versions", "Versions", facts=facts_of(versions)) if versions else None,
    ]


def facts_of(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A table of numbers, words and lists as names and texts.

    Args:
        table: as it is in JSON.
    """
    return [(name.replace("_", " "), _fact(value)) for name, value in table.items()]


def _fact(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return format_count(value)
    return shorten(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 300)


def made_pictures(run: Run, gallery: Gallery) -> list[Markup]:
    """The images that a run's method made; files that are broken are passed over.

    Args:
        run: the run.
        gallery: where pictures go.
    """
    found = []
    for name, content in _pictures(run):
        if "lines" not in content:
            described = f"Images that {name} made, a class after another."
            found.append(gallery.hang(f"made-{name}", plots.image_sheet(content.tensor("images").numpy()), described))
    return found


def drawn_pictures(run: Run, gallery: Gallery, title: str = "") -> list[Markup]:
    """What a run's model drew when it was judged.

    Args:
        run: the run.
        gallery: where pictures go.
        title: stands above each sheet.
    """
    found = []
    for name, content in _pictures(run):
        try:
            lines = [str(line) for line in json.loads(content.text("lines"))] if "lines" in content else []
        except (ValueError, PayloadError):
            continue
        if lines:
            described = f"What {title or 'the model'} draws, a line for each class: {', '.join(lines)}."
            figure = plots.drawing_sheet(content.tensor("images").numpy(), lines, title)
            found.append(gallery.hang(f"drawn-{title}-{name}", figure, described))
    return found


def _pictures(run: Run) -> Iterator[tuple[str, Payload]]:
    for name, file in run.pictures.items():
        try:
            content = Payload.decode(file.read_bytes())
            content.tensor("images")
        except (OSError, PayloadError):
            continue
        yield name, content
