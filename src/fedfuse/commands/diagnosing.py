"""``fedfuse diagnose``: is one round enough?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedfuse import experiment
from fedfuse.core.errors import ConfigError
from fedfuse.experiment import Observer
from fedfuse.experiment.diagnosing import diagnose, diagnose_run, diagnosis_name
from fedfuse.report.diagnosis_page import WORDS, write_diagnosis
from fedfuse.report.diagnosis_reading import DiagnosedSetting, DiagnosisBoard, parse_diagnosis
from fedfuse.report.units import DASH, format_bytes, format_count, format_percent

_SHOWN = {
    "L, largest curvature": "smoothness",
    "τ, relative update": "update_size",
    "of LoRA's base weights": "base_update_size",
    "Tk, local steps": "num_steps",
    "m, clients": "num_clients",
    "|w0|": "start_length",
    "bound L τ Tk m |w0|": "product",
    "mean cosine of updates": "agreement",
    "loss at the first weights": "start_loss",
    "loss at the mean": "mean_loss",
    "rise between two clients": "barrier",
}


def diagnose_and_tell(
    path: Path,
    settings: Sequence[str],
    *,
    num_rounds: int,
    measure: bool,
    vary: Sequence[str],
    seeds: int,
    out: Path | None,
    observer: Observer,
) -> tuple[dict[str, Any], Path]:
    """Diagnose a configuration, or a finished run of the probe, and write the page.

    Args:
        path: a YAML configuration, or a run's folder.
        settings: overrides of the configuration.
        num_rounds: what one round is held against.
        measure: also run both ways.
        vary: settings to several values.
        seeds: how many.
        out: the folder; named after the configuration if left out.
        observer: hears how far it is.

    Returns:
        The diagnosis, and its page.

    Raises:
        ConfigError: options of a configuration came with a run.
    """
    if path.is_dir():
        if settings or measure or vary or seeds != 1 or out is not None:
            raise ConfigError(
                "these options are for configurations, and this is a run's folder",
                where="--set, --measure, --vary, --seeds, --out",
                fix="leave them out, or name the configuration",
            )
        return diagnose_run(path, num_rounds), write_diagnosis(path)
    checked, varied = experiment.read_config(path, settings), experiment.read_variations(vary)
    folder = out or Path("runs") / diagnosis_name(checked, varied)
    table = diagnose(
        checked, num_rounds=num_rounds, measure=measure, vary=varied, seeds=seeds, out=folder, observer=observer
    )
    return table, write_diagnosis(folder)


def print_diagnosis(table: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the numbers of every setting and the verdict in words.

    Args:
        table: as in ``diagnosis.json``.
        console: where; the terminal if left out.
    """
    console = console or Console()
    board = parse_diagnosis(table)
    numbers = Table(box=None, pad_edge=False, header_style="dim")
    numbers.add_column("")
    for setting in board.settings:
        numbers.add_column(setting.name if len(board.settings) > 1 else "", justify="right")
    for words, name in _SHOWN.items():
        if any(name in setting.numbers for setting in board.settings):
            numbers.add_row(words, *(_short(setting.numbers.get(name)) for setting in board.settings))
    numbers.add_row("trained numbers", *(format_count(s.numbers.get("num_parameters")) for s in board.settings))
    numbers.add_row("predicted gap", *(format_percent(s.numbers.get("predicted_gap"), 0) for s in board.settings))
    for words, cells in _measured_rows(board):
        numbers.add_row(words, *cells)
    numbers.add_row("one round", *(f"[bold]{WORDS.get(s.verdict, DASH)}[/bold]" for s in board.settings))
    console.print(numbers)
    for setting in board.settings:
        console.print()
        if len(board.settings) > 1:
            console.print(f"{setting.name}:", markup=False, highlight=False)
        for sentence in setting.sentences:
            console.print(sentence, markup=False, highlight=False)


def _measured_rows(board: DiagnosisBoard) -> list[tuple[str, list[str]]]:
    if not any(setting.measured for setting in board.settings):
        return []

    def row(name: str, written: Any) -> list[str]:
        return [written(setting.measured.get(name)) for setting in board.settings]

    rounds = f"{board.num_rounds} rounds"
    return [
        ("measured gap", [format_percent(setting.measured_gap, 0) for setting in board.settings]),
        ("accuracy of one round", row("accuracy_one", format_percent)),
        (f"accuracy of {rounds}", row("accuracy_many", format_percent)),
        ("difference", [_difference(setting) for setting in board.settings]),
        ("upload of one round", row("upload_bytes_one", format_bytes)),
        (f"upload of {rounds}", row("upload_bytes_many", format_bytes)),
    ]


def _difference(setting: DiagnosedSetting) -> str:
    gap, spread = setting.measured.get("accuracy_gap"), setting.measured.get("accuracy_gap_std")
    if gap is None:
        return DASH
    return f"{100 * gap:+.1f}" + (f" ± {100 * spread:.1f}" if spread else "") + " points"


def _short(value: float | None) -> str:
    return DASH if value is None else f"{value:.3g}"
