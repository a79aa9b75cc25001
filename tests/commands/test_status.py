"""``fedfuse status`` reads what the server left in the run's folder."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedfuse.commands import status as module
from fedfuse.commands.status import read_status, show
from fedfuse.core.errors import ConfigError
from fedfuse.runtimes.flower.board import Board


def board(folder: Path, **clients: dict[str, Any]) -> None:
    kept = Board(folder / module.STATUS_FILE)
    kept.exchange = "block_1"
    for name, facts in clients.items():
        line = kept.line(name)
        for key, value in facts.items():
            setattr(line, key, value)
    kept.turned_away = [{"node": 3, "reason": 'no client "x" is expected\n  fix: ...', "at": 1.0}] * 2
    kept.write(now=True)


def journal(folder: Path, key: str, client: str, exchange: str, at: float, num_bytes: int = 1000) -> None:
    path = folder / "journal" / f"{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"client": client, "exchange": exchange, "upload_bytes": num_bytes}))
    os.utime(path, (at, at))


def shown(folder: Path) -> str:
    console = Console(file=io.StringIO(), width=160, color_system=None)
    show(folder, console=console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_an_empty_folder_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_status(tmp_path)
    assert str(caught.value) == (
        f"nothing has happened in this folder yet\n  where: {tmp_path}\n  fix:   name the --out folder of fedfuse serve"
    )


def test_who_has_sent_what_and_who_is_awaited(tmp_path: Path) -> None:
    board(
        tmp_path,
        a={"is_online": True, "last_seen": 9.0, "exchange": "block_1", "state": "answered", "upload_wire_bytes": 2048},
        b={"last_seen": 9.0, "exchange": "block_1", "state": "sending", "received_bytes": 1024, "expected_bytes": 4096},
        c={"state": "missing", "exchange": "block_1", "reason": "no answer\n  fix: wait"},
        d={},
    )
    journal(tmp_path, "k1", "a", "block_0", 100.0)
    journal(tmp_path, "k2", "a", "block_1", 200.0, 24)
    journal(tmp_path, "k3", "b", "block_0", 150.0)
    status = read_status(tmp_path)
    assert status.headline == f"{tmp_path}: exchange block_1, awaited: b, c, d"
    assert status.turned_away == ['no client "x" is expected']
    assert not status.is_over
    a, b, c, d = status.clients
    assert (a.connection, a.state) == ("connected", "block_1: answered")
    assert a.sent == {"block_0": (100.0, 1000), "block_1": (200.0, 24)}
    assert a.wire_bytes == 2048
    assert (b.connection, b.state) == ("away", "block_1: 1 KiB of 4 KiB")
    assert (c.connection, c.state) == ("never seen", "block_1: missing: no answer")
    assert (d.connection, d.state) == ("never seen", "awaited")
    text = shown(tmp_path)
    assert "block_0, block_1" in text
    assert 'turned away: no client "x" is expected' in text


def test_a_finished_run_says_so_without_its_board(tmp_path: Path) -> None:
    journal(tmp_path, "k1", "a", "local_models", 100.0)
    (tmp_path / "result.json").write_text(json.dumps({"missing": {"b": "no reply"}}))
    status = read_status(tmp_path)
    assert status.headline == f"{tmp_path}: done, without b"
    assert [line.name for line in status.clients] == ["a", "b"]
    assert status.is_over


def test_damaged_files_are_passed_over(tmp_path: Path) -> None:
    journal(tmp_path, "k1", "a", "local_models", 100.0)
    (tmp_path / "journal" / "k2.json").write_text("{")
    (tmp_path / "flower").mkdir()
    (tmp_path / module.STATUS_FILE).write_text("[1]")
    assert read_status(tmp_path).headline == f"{tmp_path}: enrolment, awaited: nobody"


def test_watching_ends_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal(tmp_path, "k1", "a", "local_models", 100.0)

    def finish(seconds: float) -> None:
        (tmp_path / "result.json").write_text("{}")

    monkeypatch.setattr(time, "sleep", finish)
    console = Console(file=io.StringIO(), width=120)
    show(tmp_path, watches=True, console=console)
    assert "done" in console.file.getvalue()  # type: ignore[attr-defined]
