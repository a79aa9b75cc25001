"""The file ``diagnosis.json`` of ``fedfuse diagnose``, read into values that the pictures and the page can trust."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedfuse.report.reading import read_table
from fedfuse.report.units import in_words, number

FILE = "diagnosis.json"


@dataclass(frozen=True)
class LossLine:
    """The loss along the straight line between two models.

    Args:
        start: name of the model that it begins at.
        end: name of the model that it ends at.
        places: from 0 to 1.
        losses: one per place.
    """

    start: str
    end: str
    places: tuple[float, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class DiagnosedSetting:
    """One setting of a diagnosis.

    Args:
        varied: the settings that differ from the others', with this one's values.
        numbers: of the diagnosis, by name.
        verdict: ``enough``, ``open`` or ``not_enough``.
        sentences: the verdict and its reasons.
        predicted_gaps: of the single seeds.
        measured: numbers of the measurement, by name; empty where none was made.
        measured_lists: of the single seeds, by name.
        clients: ids of the clients that were measured.
        cosines: between their updates, of the first seed.
        lines: losses along lines, of the first seed.
    """

    varied: Mapping[str, Any]
    numbers: Mapping[str, float]
    verdict: str
    sentences: tuple[str, ...]
    predicted_gaps: tuple[float, ...] = ()
    measured: Mapping[str, float] = field(default_factory=dict)
    measured_lists: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    clients: tuple[str, ...] = ()
    cosines: tuple[tuple[float, ...], ...] = ()
    lines: tuple[LossLine, ...] = ()

    @property
    def name(self) -> str:
        """The setting in a few words."""
        return in_words(self.varied) or "this configuration"

    @property
    def measured_gap(self) -> float | None:
        """Distance between the models of one round and of many, over how far one round went."""
        distance, went = self.measured.get("distance"), self.numbers.get("mean_length")
        return distance / went if distance is not None and went else None


@dataclass(frozen=True)
class DiagnosisBoard:
    """A whole diagnosis.

    Args:
        settings: in the order of the file.
        num_rounds: what one round was held against.
        method: what was measured; empty where nothing was.
        seeds: of the runs.
        config: the resolved configuration of the first.
        versions: of the software.
        near: predicted gaps up to here counted as near.
        far: predicted gaps from here on counted as far.
    """

    settings: tuple[DiagnosedSetting, ...]
    num_rounds: int
    method: str
    seeds: tuple[str, ...]
    config: Mapping[str, Any]
    versions: Mapping[str, Any]
    near: float = 0.0
    far: float = 0.0


def read_diagnosis(folder: Path) -> DiagnosisBoard:
    """Read ``diagnosis.json``.

    Args:
        folder: of a ``fedfuse diagnose``.

    Raises:
        ConfigError: it is not there, or no JSON table.
    """
    return parse_diagnosis(read_table(folder / FILE))


def parse_diagnosis(table: Mapping[str, Any]) -> DiagnosisBoard:
    """Make a board of the table in ``diagnosis.json``.

    Args:
        table: of the file.
    """
    return DiagnosisBoard(
        settings=tuple(_setting(row) for row in table.get("settings") or ()),
        num_rounds=int(number(table.get("num_rounds")) or 0),
        method=str(table.get("method") or ""),
        seeds=tuple(str(seed) for seed in table.get("seeds") or ()),
        config=dict(table.get("config") or {}),
        versions=dict(table.get("versions") or {}),
        near=number(table.get("near")) or 0.0,
        far=number(table.get("far")) or 0.0,
    )


def _setting(row: Mapping[str, Any]) -> DiagnosedSetting:
    diagnosis, measured = dict(row.get("diagnosis") or {}), dict(row.get("measured") or {})
    return DiagnosedSetting(
        varied=dict(row.get("varied") or {}),
        numbers=_numbers(diagnosis),
        verdict=str(diagnosis.get("verdict", "")),
        sentences=tuple(str(text) for text in diagnosis.get("sentences") or ()),
        predicted_gaps=_row(row.get("predicted_gaps")),
        measured=_numbers(measured),
        measured_lists={name: _row(values) for name, values in measured.items() if isinstance(values, list)},
        clients=tuple(str(name) for name in row.get("clients") or ()),
        cosines=tuple(_row(line) for line in row.get("cosines") or ()),
        lines=tuple(
            LossLine(str(line["from"]), str(line["to"]), _row(line["places"]), _row(line["losses"]))
            for line in row.get("lines") or ()
        ),
    )


def _numbers(table: Mapping[str, Any]) -> dict[str, float]:
    found = {name: number(value) for name, value in table.items()}
    return {name: value for name, value in found.items() if value is not None}


def _row(values: Any) -> tuple[float, ...]:
    found = [number(value) for value in values or ()]
    return tuple(float("nan") if value is None else value for value in found)
