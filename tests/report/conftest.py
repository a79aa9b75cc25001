"""A run and a comparison, made up, as the files that a report reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedfuse.report import write_report

HOSTILE = '</script><img src=x onerror="alert(1)"> & $x^2$ ]]>'


def result_table(method: str = "fusefl", accuracy: float | None = 0.9, seed: int = 0) -> dict[str, Any]:
    """What ``result.json`` holds: three clients, three classes, one of them with a hostile name."""
    counts = {"client_0": [8, 0, 2], "client_2": [0, 5, 0], "client_10": [1, 1, 1]}
    return {
        "method": method,
        "accuracy": accuracy,
        "loss": 0.3,
        "class_names": ["cat", "dog", HOSTILE],
        "confusion": None if accuracy is None else [[9, 1, 0], [0, 8, 2], [0, 0, 10]],
        "seed": seed,
        "clients": {
            name: {
                "num_examples": sum(row),
                "label_counts": row,
                "accuracy": accuracy,
                "accuracy_kind": "fused model on validation",
            }
            for name, row in counts.items()
        },
        "ledger": {
            "upload_bytes": 1536,
            "download_bytes": 1024,
            "upload_bytes_total": 4608,
            "download_bytes_total": 3072,
            "exchanges": 2,
            "storage_bytes": 6000,
            "artifact_bytes": 2048,
            "client_seconds": 75.0,
            "server_seconds": 0.25,
            "peak_rss_bytes": 1e9,
        },
        "missing": {"client_11": "out of memory <b>"},
        "artifact": {"digest": "abc123", "num_parameters": 4321, "path": "artifact"},
        "versions": {"fedfuse": "0.1.0", "python": "3.11"},
        "config": {"seed": seed, "method": {"name": method, "note": HOSTILE}},
        "facts": {"calibration_shift": 0.012345, "steps": 4000},
    }


def write_run(folder: Path, **changes: Any) -> Path:
    """Write the three files of a run."""
    folder.mkdir(parents=True)
    named = {key: changes.pop(key) for key in ("method", "accuracy", "seed") if key in changes}
    (folder / "result.json").write_text(json.dumps({**result_table(**named), **changes}), encoding="utf-8")
    entries, lines = [], []
    for exchange in ("block_0", "block_1"):
        for client in ("client_0", "client_2", "client_10"):
            entries.append(
                {
                    "exchange": exchange,
                    "client": client,
                    "upload_bytes": 768,
                    "download_bytes": 512,
                    "seconds": 2.0,
                    "from_journal": exchange == "block_0",
                }
            )
            lines.append({"exchange": exchange, "client": client, "curve": "train_loss", "values": [2.0, 1.0, 0.5]})
    (folder / "ledger.json").write_text(json.dumps({"entries": entries, "totals": {}}), encoding="utf-8")
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"event": "missing"}\n{"exchange": "bl'
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def board_row(method: str, accuracies: list[float], upload_bytes: float, **changes: Any) -> dict[str, Any]:
    """A line of ``board.json``."""
    mean = sum(accuracies) / len(accuracies)
    squares = sum((value - mean) ** 2 for value in accuracies)
    return {
        "method": method,
        "accuracy_mean": mean,
        "accuracy_std": (squares / (len(accuracies) - 1)) ** 0.5 if len(accuracies) > 1 else 0.0,
        "accuracies": accuracies,
        "num_seeds": len(accuracies),
        "upload_bytes": upload_bytes,
        "download_bytes": 1024,
        "exchanges": 1,
        "storage_bytes": 9000,
        "artifact_bytes": 2048,
        "client_seconds": 75.0,
        "server_seconds": 0.25,
        "peak_rss_bytes": 1e9,
        "runs": [f"{method}/seed_{seed}" for seed in range(len(accuracies))],
        **changes,
    }


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """The folder of a run."""
    return write_run(tmp_path / "run")


@pytest.fixture
def make_run() -> Callable[..., Path]:
    """Writes the folder of a run, with changes to ``result.json``."""
    return write_run


@pytest.fixture
def make_row() -> Callable[..., dict[str, Any]]:
    """Makes a line of a board."""
    return board_row


@pytest.fixture
def result() -> dict[str, Any]:
    """The table in ``result.json``."""
    return result_table()


def board_table() -> dict[str, Any]:
    """What ``board.json`` holds: four methods, two seeds."""
    rows = [
        board_row("fedavg", [0.40, 0.44], 1000),
        board_row("fusefl", [0.93, 0.95], 1536, exchanges=5),
        board_row("local", [0.30, 0.32], 0),
        board_row("centralized", [0.97, 0.97], 90000),
    ]
    return {"rows": rows, "seeds": [0, 1], "config": {"seed": 0}, "versions": {"fedfuse": "0.1.0"}}


@pytest.fixture
def board() -> dict[str, Any]:
    """The table in ``board.json``."""
    return board_table()


@pytest.fixture(scope="session")
def board_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison with its page; one run has a page of its own, the last method's runs are lost."""
    folder = tmp_path_factory.mktemp("comparison")
    board = board_table()
    for row in board["rows"][:3]:
        for seed, accuracy in enumerate(row["accuracies"]):
            write_run(folder / row["method"] / f"seed_{seed}", method=row["method"], accuracy=accuracy, seed=seed)
    (folder / "board.json").write_text(json.dumps(board), encoding="utf-8")
    (folder / "fusefl" / "seed_0" / "report.html").write_text("", encoding="utf-8")
    write_report(folder)
    return folder


@pytest.fixture
def hostile() -> str:
    """The name of a class that tries to leave its place."""
    return HOSTILE
