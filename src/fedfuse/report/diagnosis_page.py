"""The page ``diagnosis.html``: is one round enough?"""

from __future__ import annotations

from pathlib import Path

from fedfuse.core.files import write_atomically
from fedfuse.report.diagnosis_reading import DiagnosedSetting, DiagnosisBoard, read_diagnosis
from fedfuse.report.layout import Cell, Gallery, Row, Section, SortableTable, cell
from fedfuse.report.page import render_page
from fedfuse.report.plots.one_round import gap_over_settings, loss_between, update_cosines
from fedfuse.report.shared_sections import origin_sections
from fedfuse.report.units import DASH, format_bytes, format_count, format_percent

PAGE = "diagnosis.html"
WORDS = {"enough": "enough", "open": "open", "not_enough": "not enough"}

# What is shown of a setting: name in the file, words, how it is written.
NUMBERS = (
    ("smoothness", "L: largest curvature at the first weights, mean of the clients"),
    ("largest_smoothness", "L of the client with the largest"),
    ("bent_along_updates", "change of slope over distance, along the updates"),
    ("update_size", "τ: length of an update over that of the first weights"),
    ("base_update_size", "change of the weights over the base weights that LoRA changes"),
    ("num_steps", "Tk: local steps of a client in all"),
    ("num_clients", "m: clients"),
    ("start_length", "|w0|: length of the first weights"),
    ("product", "L τ Tk m |w0|: the published bound, with Tk in steps"),
    ("step_bound", "the bound with step lengths and constants"),
    ("predicted_distance", "predicted distance between one round and many"),
    ("mean_length", "how far one round went"),
    ("agreement", "mean cosine between two clients' updates"),
    ("least_agreement", "smallest cosine"),
    ("start_loss", "validation loss at the first weights"),
    ("client_loss", "validation loss of a client's model, on all clients' validation parts"),
    ("mean_loss", "validation loss at the mean"),
    ("barrier", "rise of the loss between two clients' models"),
    ("mean_barrier", "rise of the loss on the way to the mean"),
)


def write_diagnosis(folder: str | Path) -> Path:
    """Draw the pictures of a diagnosis and write its page; an older page is replaced.

    The page needs no other file and no network. The pictures are also written to ``figures/``, as PNG and SVG.

    Args:
        folder: holds ``diagnosis.json``.

    Returns:
        Path of ``diagnosis.html``.

    Raises:
        ConfigError: the file is not there, or no JSON table.
    """
    folder = Path(folder)
    board = read_diagnosis(folder)
    seeds = f"seed{'' if len(board.seeds) == 1 else 's'} {', '.join(board.seeds)}" if board.seeds else ""
    html = render_page(
        kicker=["diagnosis", f"one round against {board.num_rounds}", seeds],
        headline=diagnosis_headline(board),
        tiles=_tiles(board),
        sections=_sections(board, Gallery(folder / "figures")),
        versions=board.versions,
    )
    write_atomically(folder / PAGE, html.encode("utf-8"))
    return folder / PAGE


def diagnosis_headline(board: DiagnosisBoard) -> list[str]:
    """The result in plain words.

    Args:
        board: the diagnosis.

    Returns:
        Sentences, the one that matters most first.
    """
    if len(board.settings) == 1:
        return list(board.settings[0].sentences)
    found = []
    for verdict, words in (
        ("enough", "One round should be enough with {}."),
        ("open", "It may be enough with {}."),
        ("not_enough", "It is not enough with {}."),
    ):
        names = [setting.name for setting in board.settings if setting.verdict == verdict]
        if names:
            found.append(words.format("; ".join(names)))
    if found and found[0].startswith("It"):
        found[0] = f"One round{found[0][2:]}"
    return found or ["Nothing was diagnosed."]


def _tiles(board: DiagnosisBoard) -> list[tuple[str, str]]:
    first = board.settings[0] if board.settings else None
    if first is None:
        return []
    single = len(board.settings) == 1
    return [
        ("verdict" if single else "first verdict", WORDS.get(first.verdict, DASH)),
        ("predicted gap", format_percent(first.numbers.get("predicted_gap"), 0)),
        *([("measured gap", format_percent(first.measured_gap, 0))] if first.measured else []),
        ("clients", format_count(first.numbers.get("num_clients"))),
        *([] if single else [("settings", str(len(board.settings)))]),
        ("seed" if len(board.seeds) == 1 else "seeds", str(len(board.seeds))),
    ]


def _sections(board: DiagnosisBoard, gallery: Gallery) -> list[Section]:
    sections = []
    if len(board.settings) > 1 or any(setting.measured for setting in board.settings):
        figure = gap_over_settings(board.settings, board.near, board.far)
        described = (
            "Predicted and measured gap, accuracies and the bound's terms over the settings; the table holds all."
        )
        text = (
            "Gaps are distances between the models of one round and of many, over how far one round went. Small dots "
            "are single seeds. The bound's terms are shown relative to the first setting: its size says little, its "
            "trend something."
        )
        picture = gallery.hang("gap", figure, described)
        sections.append(Section("gap", "Gap and bound", text, [picture], table=_table(board)))
    for setting in board.settings:
        sections += _setting_sections(setting, gallery, several=len(board.settings) > 1)
    text = "That of the first setting; each run's folder holds its own."
    sections += [part for part in origin_sections(board.config, board.versions, text) if part is not None]
    return sections


def _setting_sections(setting: DiagnosedSetting, gallery: Gallery, *, several: bool) -> list[Section]:
    name = f" · {setting.name}" if several else ""
    lines = gallery.hang(
        f"losses {setting.name}" if several else "losses",
        loss_between(setting),
        "Validation loss along the line from the first weights to the mean, and between clients.",
    )
    cosines = gallery.hang(
        f"cosines {setting.name}" if several else "cosines",
        update_cosines(setting),
        "Cosine between the updates of each two clients.",
    )
    key = "".join(letter if letter.isalnum() else "-" for letter in setting.name)
    facts = [(words, f"{setting.numbers[field]:.4g}") for field, words in NUMBERS if field in setting.numbers]
    text = " ".join(setting.sentences)
    return [
        Section(f"verdict-{key}", f"What was measured{name}", text, facts=facts),
        Section(
            f"losses-{key}",
            f"Loss between models{name}",
            "On the clients' validation parts, never on the test set; of the first seed.",
            [lines],
        ),
        Section(f"cosines-{key}", f"Directions of the clients{name}", "Of the first seed.", [cosines]),
    ]


def _table(board: DiagnosisBoard) -> SortableTable:
    rows = []
    for setting in board.settings:
        measured, numbers = setting.measured, setting.numbers
        rows.append(
            Row(
                [
                    Cell(setting.name),
                    Cell(WORDS.get(setting.verdict, DASH)),
                    cell(numbers.get("num_parameters"), format_count),
                    cell(numbers.get("product"), _short),
                    cell(numbers.get("predicted_gap"), format_percent),
                    cell(setting.measured_gap, format_percent),
                    cell(measured.get("accuracy_one"), format_percent),
                    cell(measured.get("accuracy_many"), format_percent),
                    cell(measured.get("upload_bytes_one"), format_bytes),
                    cell(measured.get("upload_bytes_many"), format_bytes),
                ],
                setting.verdict == "enough",
            )
        )
    columns = (
        "setting",
        "one round",
        "trained",
        "bound",
        "predicted gap",
        "measured gap",
        "accuracy, one",
        f"accuracy, {board.num_rounds}",
        "upload, one",
        f"upload, {board.num_rounds}",
    )
    return SortableTable(columns, rows)


def _short(value: float | None) -> str:
    return DASH if value is None else f"{value:.3g}"
