"""Is one round enough? Measured on a configuration, beforehand; and against many rounds, where that is asked for."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fedfuse.analysis.one_round import FAR, NEAR, diagnosis_of
from fedfuse.core.artifact import Artifact
from fedfuse.core.errors import ConfigError
from fedfuse.core.files import write_atomically
from fedfuse.core.registry import METHODS
from fedfuse.experiment.comparing import compare
from fedfuse.experiment.configuration import Config, ConfigLike, folder_name, read_config
from fedfuse.experiment.result import Observer
from fedfuse.methods.fedavg import FedAvg

FILE = "diagnosis.json"
PROBE = "one_round_probe"
_PROBED, _ONE = "probe", "one round"


def diagnose(
    config: ConfigLike,
    *,
    overrides: Sequence[str] = (),
    num_rounds: int = 10,
    measure: bool = False,
    vary: Mapping[str, Sequence[Any]] | Sequence[str] = (),
    seeds: int | Sequence[int] = 1,
    out: str | Path | None = None,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Say whether one round of averaging is enough for a federation, and perhaps measure whether that was right.

    Every client trains once, by the question that every one-round method asks: a later run in the same folder uses
    the answers.

    Args:
        config: a YAML file or a table. Its method's local training is looked at; what is measured is its method where
            that is FedAvg or one of its kind, else FedAvg.
        overrides: ``section.key=value``.
        num_rounds: T, what one round is held against, at equal local work; at least 2.
        measure: also run one round and T rounds, and compare them on the test set.
        vary: settings to several values each, or texts ``section.key=value,value``: everything with each value.
        seeds: how many, counted from the configuration's seed, or which.
        out: the folder. The same command continues there after a crash.
        observer: hears how far it is.

    Returns:
        As in ``diagnosis.json``: ``{"settings": [{"varied": ..., "diagnosis": ..., "measured": ...}], ...}``.

    Raises:
        ConfigError: the configuration cannot be diagnosed.
    """
    checked = read_config(config, overrides)
    _check(checked, num_rounds)
    name = _measured_method(checked) if measure else "fedavg"
    many = f"{num_rounds} rounds"
    methods: list[Mapping[str, Any]] = [{"name": PROBE, "label": _PROBED}]
    if measure:
        methods += [{"name": name, "num_rounds": T, "label": label} for label, T in ((_ONE, 1), (many, num_rounds))]
    with ExitStack() as stack:
        if out is None:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedfuse-")))
        else:
            home = Path(out)
        board = compare(checked, methods, seeds=seeds, vary=vary, out=home, observer=observer)
        settings = []
        for varied in _choices(board):
            rows = {row["method"]: row for row in board["rows"] if row.get("varied", {}) == varied}
            measured = _measured(home, rows[_ONE], rows[many]) if measure else None
            settings.append(_setting(_probed_facts(home, rows[_PROBED]["runs"]), num_rounds, varied, measured))
        table = {
            "settings": settings,
            "varied": board.get("varied", {}),
            "num_rounds": num_rounds,
            "near": NEAR,
            "far": FAR,
            "method": name if measure else None,
            "seeds": board["seeds"],
            "config": board["config"],
            "versions": board["versions"],
        }
        write_atomically(home / FILE, json.dumps(table, indent=1).encode())
    return table


def diagnose_run(folder: str | Path, num_rounds: int = 10) -> dict[str, Any]:
    """Diagnose a finished run of the method ``one_round_probe``, as of a real federation; nobody is asked again.

    Args:
        folder: the run's.
        num_rounds: T, what one round is held against, at least 2.

    Returns:
        As in ``diagnosis.json``, which is written into the folder.

    Raises:
        ConfigError: the folder holds no such run.
    """
    home = Path(folder)
    _check_rounds(num_rounds)
    try:
        facts = json.loads((home / "result.json").read_text(encoding="utf-8"))
        table = {
            "settings": [_setting([facts["facts"]["one_round"]], num_rounds, {}, None)],
            "varied": {},
            "num_rounds": num_rounds,
            "near": NEAR,
            "far": FAR,
            "method": None,
            "seeds": [facts["seed"]],
            "config": facts["config"],
            "versions": facts["versions"],
        }
    except (OSError, ValueError, LookupError, TypeError):
        raise ConfigError(
            f"this is no finished run of the method {PROBE}",
            where=str(home),
            fix=f"run it: fedfuse run CONFIG --set method.name={PROBE}, or diagnose a configuration",
        ) from None
    write_atomically(home / FILE, json.dumps(table, indent=1).encode())
    return table


def diagnosis_name(config: Config, varied: Mapping[str, Sequence[Any]]) -> str:
    """A name for a diagnosis's folder that is the same for the same question, so that the same command continues.

    Args:
        config: the configuration.
        varied: settings that are varied.
    """
    return "-by-".join([f"diagnose-{folder_name(config)}", *varied])


def _check(config: Config, num_rounds: int) -> None:
    _check_rounds(num_rounds)
    if config.data.source == "remote":
        raise ConfigError(
            "the clients of this configuration are elsewhere",
            where="data.source",
            fix=f"run fedfuse serve with method: {{name: {PROBE}}}, then fedfuse diagnose on its folder",
        )
    if config.data.validation_fraction == 0:
        raise ConfigError(
            "losses are measured on the clients' validation parts, and there are none",
            where="data.validation_fraction",
            fix="set it above 0, such as 0.1",
        )


def _check_rounds(num_rounds: int) -> None:
    if num_rounds < 2:
        raise ConfigError(
            f"one round is held against {num_rounds}",
            where="--rounds",
            fix="give the rounds of the other way, 2 or more",
        )


def _measured_method(config: Config) -> str:
    """The configuration's method where its rounds are those of averaging, else FedAvg."""
    kind = METHODS.get(config.method.name)
    return config.method.name if issubclass(kind, FedAvg) else "fedavg"


def _choices(board: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for row in board["rows"]:
        varied = row.get("varied", {})
        if varied not in found:
            found.append(varied)
    return found


def _setting(
    probed: Sequence[Mapping[str, Any]], num_rounds: int, varied: Mapping[str, Any], measured: Mapping[str, Any] | None
) -> dict[str, Any]:
    """One setting of the table; what cannot be averaged over seeds is that of the first."""
    return {
        "varied": varied,
        "diagnosis": diagnosis_of(probed, num_rounds).to_json(),
        "predicted_gaps": [diagnosis_of([facts], num_rounds).predicted_gap for facts in probed],
        **{name: probed[0][name] for name in ("clients", "cosines", "lines", "num_validation")},
        "measured": measured,
    }


def _probed_facts(home: Path, runs: Sequence[str]) -> list[Mapping[str, Any]]:
    tables = [json.loads((home / run / "result.json").read_text(encoding="utf-8")) for run in runs]
    return [table["facts"]["one_round"] for table in tables]


def _measured(home: Path, one: Mapping[str, Any], many: Mapping[str, Any]) -> dict[str, Any]:
    """What both ways came to on the test set, and how far their models are from each other; means over seeds."""
    results: dict[str, list[dict[str, Any]]] = {"one": [], "many": []}
    distances = []
    for first, second in zip(one["runs"], many["runs"], strict=True):
        for key, run in (("one", first), ("many", second)):
            results[key].append(json.loads((home / run / "result.json").read_text(encoding="utf-8")))
        distances.append(_distance(home / first / "artifact", home / second / "artifact"))
    table: dict[str, Any] = {"distance": statistics.fmean(distances), "distances": distances}
    for key, rows in (("one", one), ("many", many)):
        for what in ("accuracy", "loss"):
            values = [result[what] for result in results[key] if result[what] is not None]
            table[f"{what}_{key}"] = statistics.fmean(values) if values else None
            table[f"{what}_{key}_by_seed"] = values
        table[f"upload_bytes_{key}"] = rows["upload_bytes"]
    gaps = [b - a for a, b in zip(table["accuracy_one_by_seed"], table["accuracy_many_by_seed"], strict=True)]
    table["accuracy_gap"] = statistics.fmean(gaps) if gaps else None
    table["accuracy_gap_std"] = statistics.stdev(gaps) if len(gaps) > 1 else 0.0
    return table


def _distance(first: Path, second: Path) -> float:
    """Euclidean distance between two models of one architecture, over what was trained."""
    one, other = Artifact.read(first), Artifact.read(second)
    names = [name for name, parameter in one.module().named_parameters() if parameter.requires_grad]
    squares = [(one.state[name].double() - other.state[name].double()).square().sum() for name in names]
    return float(sum(float(square) for square in squares) ** 0.5)
