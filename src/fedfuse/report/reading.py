"""The files of a run's and of a comparison's folder, read into values that the pictures and the page can trust.

A report is wanted most when something went wrong, so what is missing or odd becomes ``None`` or is left out; only a
folder that holds no result at all, or a file that is no JSON, is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedfuse.core.errors import ConfigError
from fedfuse.report.suspects import SuspectRow, read_suspects
from fedfuse.report.units import natural_key, number

COSTS = (
    "upload_bytes",
    "download_bytes",
    "exchanges",
    "storage_bytes",
    "artifact_bytes",
    "client_seconds",
    "server_seconds",
    "peak_rss_bytes",
)


@dataclass(frozen=True)
class ClientRow:
    """What a run says of one client.

    Args:
        name: client id.
        num_examples: training examples; ``None`` if unknown.
        label_counts: examples of each class, those of its validation part included.
        accuracy: in [0, 1]; ``None`` if it was not measured.
        accuracy_kind: which model on which data.
    """

    name: str
    num_examples: float | None
    label_counts: tuple[float, ...]
    accuracy: float | None
    accuracy_kind: str


@dataclass(frozen=True)
class Curve:
    """One quantity over the epochs of one client's training in one exchange.

    Args:
        exchange: key of the exchange.
        client: client id.
        name: the quantity, such as ``train_loss``.
        values: one per epoch; NaN where it was not finite.
    """

    exchange: str
    client: str
    name: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class ExchangeRow:
    """What crossed in one exchange, over all clients.

    Args:
        name: key of the exchange.
        num_clients: clients that took part.
        upload_bytes: from all clients.
        download_bytes: to all clients.
        seconds: client time, summed.
        num_from_journal: answers that were there already.
    """

    name: str
    num_clients: int
    upload_bytes: float
    download_bytes: float
    seconds: float
    num_from_journal: int


@dataclass(frozen=True)
class Run:
    """The result of one method with one seed.

    Args:
        method: its label.
        accuracy: on the test set, in [0, 1]; ``None`` without a test set.
        loss: on the test set.
        class_names: one per class.
        confusion: counts, rows are the truth; empty if it was not measured.
        seed: the run's seed.
        clients: in natural order of their ids.
        costs: totals of the ledger, by name.
        missing: reason by client id.
        artifact: facts of the fused model.
        facts: what the method itself reports.
        config: the resolved configuration.
        versions: of the software.
        curves: learning curves in order of asking.
        exchanges: what crossed, in order of asking.
        pictures: name to a file of images that the method made.
        privacy: the guarantee and its words; empty where none was asked for.
        suspects: uploads that look wrong, in order of asking.
        attack: who attacked in this simulation, and how far they came; empty where nobody did.
        metrics: further scores on the test set, by name.
    """

    method: str
    accuracy: float | None
    loss: float | None
    class_names: tuple[str, ...]
    confusion: tuple[tuple[float, ...], ...]
    seed: str
    clients: tuple[ClientRow, ...]
    costs: Mapping[str, float]
    missing: Mapping[str, str]
    artifact: Mapping[str, Any]
    facts: Mapping[str, Any]
    config: Mapping[str, Any]
    versions: Mapping[str, Any]
    curves: tuple[Curve, ...] = ()
    exchanges: tuple[ExchangeRow, ...] = ()
    pictures: Mapping[str, Path] = field(default_factory=dict)
    privacy: Mapping[str, Any] = field(default_factory=dict)
    suspects: tuple[SuspectRow, ...] = ()
    attack: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def personal(self) -> bool:
        """Whether the run's accuracy is the mean over the clients' own models, because nothing was fused."""
        return not self.confusion and any(
            client.accuracy is not None and client.accuracy_kind.startswith("own") for client in self.clients
        )


@dataclass(frozen=True)
class BoardRow:
    """One method of a comparison, over its seeds.

    Args:
        method: its label.
        accuracy: mean over seeds, in [0, 1]; ``None`` without a test set.
        spread: sample standard deviation over seeds; 0 for one seed.
        accuracies: of the single seeds.
        num_seeds: how many runs the means are over.
        costs: means over seeds, by name.
        runs: folders of the runs, relative to the comparison's.
        name: of the method in the registry; the start of the label where the file does not say.
        needs_server_data: whether it refuses to run without data of the server's own; ``None`` where nobody knows.
        takes_heterogeneous: whether clients may own models of different architectures; ``None`` where nobody knows.
        used_server_data: whether it looked at data of the server's own in these runs; ``None`` where nobody knows.
        varied: the settings that differ from row to row, with this row's values.
        attack_success: share of test examples that get the label that attackers want; ``None`` where there is none.
        metrics: mean of further scores over seeds, by name.
        metric_spreads: their sample standard deviations.
    """

    method: str
    accuracy: float | None
    spread: float
    accuracies: tuple[float, ...]
    num_seeds: int
    costs: Mapping[str, float]
    runs: tuple[str, ...]
    name: str = ""
    needs_server_data: bool | None = None
    takes_heterogeneous: bool | None = None
    used_server_data: bool | None = None
    varied: Mapping[str, Any] = field(default_factory=dict)
    attack_success: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    metric_spreads: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Board:
    """A comparison of methods.

    Args:
        rows: in the order of the file.
        seeds: of the runs.
        config: the resolved configuration.
        versions: of the software.
        varied: settings that were varied, with their values; empty for a comparison on one setting.
        folders: of the single comparisons, relative to this one's, where settings were varied.
    """

    rows: tuple[BoardRow, ...]
    seeds: tuple[str, ...]
    config: Mapping[str, Any]
    versions: Mapping[str, Any]
    varied: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    folders: tuple[str, ...] = ()

    @property
    def settings(self) -> list[tuple[Mapping[str, Any], Board]]:
        """The comparisons on single settings, each with the values that make it differ, in the order of the file."""
        if not self.varied:
            return [({}, self)]
        grouped: dict[str, list[BoardRow]] = {}
        for row in self.rows:
            grouped.setdefault(json.dumps(row.varied, sort_keys=True, default=str), []).append(row)
        return [
            (rows[0].varied, Board(tuple(rows), self.seeds, self.config, self.versions)) for rows in grouped.values()
        ]

    @property
    def ranked(self) -> list[BoardRow]:
        """The rows by falling accuracy; those without one come last, ties keep the order of the file."""
        return sorted(self.rows, key=lambda row: (row.accuracy is None, -(row.accuracy or 0.0)))


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Args:
        folder: holds ``result.json`` and, mostly, ``metrics.jsonl`` and ``ledger.json``.

    Raises:
        ConfigError: there is no ``result.json``, or a file is no JSON table.
    """
    ledger = read_table(folder / "ledger.json") if (folder / "ledger.json").is_file() else {}
    run = parse_run(read_table(folder / "result.json"), _lines(folder / "metrics.jsonl"), ledger)
    return replace(run, pictures={file.stem: file for file in sorted((folder / "pictures").glob("*.safetensors"))})


def read_board(folder: Path) -> Board:
    """Read ``board.json`` of a comparison's folder.

    Args:
        folder: the comparison's.

    Raises:
        ConfigError: there is no ``board.json``, or it is no JSON table.
    """
    return parse_board(read_table(folder / "board.json"))


def parse_run(
    result: Mapping[str, Any], metrics: Iterable[Mapping[str, Any]] = (), ledger: Mapping[str, Any] | None = None
) -> Run:
    """Make a run of the tables in its files.

    Args:
        result: of ``result.json``.
        metrics: the lines of ``metrics.jsonl``; those that are no learning curve are passed over.
        ledger: of ``ledger.json``.
    """
    clients = _table(result.get("clients"))
    rows = tuple(_client(name, _table(clients[name])) for name in sorted(clients, key=natural_key))
    confusion = tuple(tuple(_amount(cell) for cell in _list(line)) for line in _list(result.get("confusion")))
    if any(len(line) != len(confusion) for line in confusion):
        confusion = ()
    num_classes = max([len(confusion), *(len(row.label_counts) for row in rows)])
    names = [str(name) for name in _list(result.get("class_names"))]
    names += [str(index) for index in range(len(names), num_classes)]
    return Run(
        method=str(result.get("method") or "unnamed method"),
        accuracy=number(result.get("accuracy")),
        loss=number(result.get("loss", result.get("accuracy_loss"))),
        class_names=tuple(names),
        confusion=confusion,
        seed=str(result.get("seed", "")),
        clients=rows,
        costs=_numbers(result.get("ledger")),
        missing={name: str(reason) for name, reason in sorted(_table(result.get("missing")).items())},
        artifact=_table(result.get("artifact")),
        facts=_table(result.get("facts")),
        config=_table(result.get("config")),
        versions=_table(result.get("versions")),
        curves=_curves(metrics),
        exchanges=_exchanges(ledger or {}),
        privacy=_table(result.get("privacy")),
        suspects=tuple(read_suspects(result)),
        attack=_table(result.get("attack")),
        metrics=_numbers(result.get("metrics")),
    )


def parse_board(board: Mapping[str, Any]) -> Board:
    """Make a board of the table in ``board.json``.

    Args:
        board: of ``board.json``.
    """
    return Board(
        rows=tuple(_board_row(_table(row)) for row in _list(board.get("rows"))),
        seeds=tuple(str(seed) for seed in _list(board.get("seeds"))),
        config=_table(board.get("config")),
        versions=_table(board.get("versions")),
        varied={key: tuple(_list(values)) for key, values in _table(board.get("varied")).items()},
        folders=tuple(str(folder) for folder in _list(board.get("boards"))),
    )


def read_table(path: Path) -> dict[str, Any]:
    """Read a JSON file whose top is a table.

    Args:
        path: the file.

    Raises:
        ConfigError: it is not there, cannot be read or holds something else.
    """
    fix = "name the folder of a finished `fedfuse run` or `fedfuse compare`, or run the same command again"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path.name}: {error.strerror}", where=str(path), fix=fix) from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path.name} is no JSON", where=str(path), fix=fix) from None
    if not isinstance(table, dict):
        raise ConfigError(f"{path.name} holds no table", where=str(path), fix=fix)
    return table


def _lines(path: Path) -> list[dict[str, Any]]:
    """The tables of a file of JSON lines; a line that a crash cut short is passed over."""
    if not path.is_file():
        return []
    tables = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            tables.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [table for table in tables if isinstance(table, dict)]


def _table(value: object) -> dict[str, Any]:
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {}


def _list(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _amount(value: object) -> float:
    """A count: what is no number, or negative, counts nothing."""
    return max(number(value) or 0.0, 0.0)


def _numbers(value: object) -> dict[str, float]:
    found = {key: number(item) for key, item in _table(value).items()}
    return {key: item for key, item in found.items() if item is not None and item >= 0}


def _client(name: str, table: Mapping[str, Any]) -> ClientRow:
    counts = tuple(_amount(count) for count in _list(table.get("label_counts")))
    examples = number(table.get("num_examples"))
    return ClientRow(
        name=name,
        num_examples=examples if examples is not None else (sum(counts) if counts else None),
        label_counts=counts,
        accuracy=number(table.get("accuracy")),
        accuracy_kind=str(table.get("accuracy_kind") or ""),
    )


def _board_row(table: Mapping[str, Any]) -> BoardRow:
    accuracies = tuple(value for item in _list(table.get("accuracies")) if (value := number(item)) is not None)
    runs = tuple(str(run) for run in _list(table.get("runs")))
    return BoardRow(
        method=str(table.get("method") or "unnamed method"),
        accuracy=number(table.get("accuracy_mean")),
        spread=_amount(table.get("accuracy_std")),
        accuracies=accuracies,
        num_seeds=int(number(table.get("num_seeds")) or len(accuracies) or len(runs)),
        costs=_numbers({name: table.get(name) for name in COSTS}),
        runs=runs,
        name=str(table.get("name") or ""),
        needs_server_data=_truth(table.get("needs_server_data")),
        takes_heterogeneous=_truth(table.get("takes_heterogeneous")),
        used_server_data=_truth(table.get("used_server_data")),
        varied=_table(table.get("varied")),
        attack_success=number(table.get("attack_success_mean")),
        metrics=_numbers(table.get("metrics_mean")),
        metric_spreads=_numbers(table.get("metrics_std")),
    )


def _truth(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _curves(lines: Iterable[Mapping[str, Any]]) -> tuple[Curve, ...]:
    curves = []
    for line in lines:
        values = [number(value) for value in _list(line.get("values"))]
        if "curve" in line and "client" in line and any(value is not None for value in values):
            found = tuple(float("nan") if value is None else value for value in values)
            curves.append(Curve(str(line.get("exchange", "")), str(line["client"]), str(line["curve"]), found))
    return tuple(curves)


def _exchanges(ledger: Mapping[str, Any]) -> tuple[ExchangeRow, ...]:
    entries = [_table(entry) for entry in _list(ledger.get("entries"))]
    grouped: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        grouped.setdefault(str(entry.get("exchange", "")), []).append(entry)
    return tuple(
        ExchangeRow(
            name=name,
            num_clients=len({str(entry.get("client")) for entry in group}),
            upload_bytes=sum(_amount(entry.get("upload_bytes")) for entry in group),
            download_bytes=sum(_amount(entry.get("download_bytes")) for entry in group),
            seconds=sum(_amount(entry.get("seconds")) for entry in group),
            num_from_journal=sum(entry.get("from_journal") is True for entry in group),
        )
        for name, group in grouped.items()
    )
