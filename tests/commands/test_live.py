"""What a terminal shows during a comparison, and what a log keeps of it."""

from __future__ import annotations

from io import StringIO
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from fedfuse.commands.live import Live


def _live(*, terminal: bool, width: int = 100, height: int = 40) -> tuple[Live, StringIO]:
    text = StringIO()
    console = Console(file=text, force_terminal=terminal, width=width, height=height, color_system=None)
    return Live(console), text


def _result(accuracy: float | None, seconds: float, missing: dict[str, str] | None = None) -> Any:
    return SimpleNamespace(method="fedavg", accuracy=accuracy, ledger={"wall_seconds": seconds}, missing=missing or {})


def _drawn(live: Live, width: int = 100) -> list[str]:
    text = StringIO()
    Console(file=text, width=width, color_system=None).print(live.picture())
    return [" ".join(line.split()) for line in text.getvalue().splitlines() if line.strip()]


def test_one_table_of_methods_and_seeds_that_survives_a_kill() -> None:
    live, text = _live(terminal=True)
    with live:
        live.comparison_started(["fedavg", "fusefl[num_blocks=2]"], [0, 1], {"data.partition.num_clients": 5})
        live.run_started("fedavg", 0, 1, 4)
        live.run_found("fedavg", 0, {"accuracy": 0.5, "ledger": {"wall_seconds": 61.0}})
        live.run_started("fusefl[num_blocks=2]", 0, 2, 4)
        live.exchange("block_0", "client_0", 0, 3, 0.5)
        live.exchange("block_0", "client_0", 1, 3, 1.0)
        live.server("head", 1, 2)
        *table, clients, server = _drawn(live)
        assert clients.startswith("[2/4] fusefl[num_blocks=2], seed 0: clients: block_0 ")
        assert "1/3 client_0" in clients
        assert server.startswith("[2/4] fusefl[num_blocks=2], seed 0: server: head ")
        assert table == [
            "num_clients 5",
            "method seed 0 seed 1",
            "fedavg 50.0 % 1 min 1 s ·",
            "fusefl[num_blocks=2] running ·",
        ]
        live.run_ended(_result(0.941, 3.21))
        assert _drawn(live)[-1] == "fusefl[num_blocks=2] 94.1 % 3.2 s ·"
    # Nothing is left of it after a good end: the board is printed instead.
    assert text.getvalue().endswith("\x1b[2K")


def test_a_kill_leaves_the_table_with_what_is_done() -> None:
    live, text = _live(terminal=True)
    try:
        with live:
            live.comparison_started(["fedavg", "ensemble"], [0], {})
            live.run_started("fedavg", 0, 1, 2)
            live.run_ended(_result(0.5, 1.0))
            live.run_started("ensemble", 0, 2, 2)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert _drawn(live)[1:3] == ["fedavg 50.0 % 1.0 s", "ensemble interrupted"]
    assert "interrupted" in text.getvalue()


def test_many_methods_show_those_about_the_one_that_runs() -> None:
    live, _ = _live(terminal=True, height=16)
    labels = [f"method_{index:02d}" for index in range(30)]
    live.comparison_started(labels, [0], {})
    live.run_started("method_15", 0, 16, 30)
    lines = _drawn(live)
    assert any(line.startswith("method_15 running") for line in lines)
    assert len(lines) == 7 + 2
    assert lines[-1] == "0 of 30 done, 23 hidden"


def test_many_seeds_become_one_column() -> None:
    live, _ = _live(terminal=True, width=80)
    live.comparison_started(["fedavg"], list(range(10)), {})
    for seed, accuracy in ((0, 0.5), (1, 0.7)):
        live.run_started("fedavg", seed, seed + 1, 10)
        live.run_ended(_result(accuracy, 1.0))
    live.run_started("fedavg", 2, 3, 10)
    assert _drawn(live, 80)[:2] == ["method seeds", "fedavg 2 of 10, mean 60.0 %, running"]


def test_a_log_has_a_line_for_each_run() -> None:
    live, text = _live(terminal=False)
    with live:
        live.comparison_started(["fedavg"], [0, 1], {"data.limit": 100})
        live.run_started("fedavg", 0, 1, 2)
        live.run_found("fedavg", 0, {"accuracy": 0.5, "ledger": {}})
        live.run_started("fedavg", 1, 2, 2)
        live.run_ended(_result(None, 1.0, {"client_1": "gone"}))
        live.note("the journal's entry was damaged")
    assert text.getvalue().splitlines() == [
        "limit 100:",
        "[1/2] fedavg, seed 0: accuracy 50.0%, done before",
        "[2/2] fedavg, seed 1: no test set, missing: client_1",
        "note: the journal's entry was damaged",
    ]


def test_a_single_run_has_bars_and_a_line_but_no_table() -> None:
    live, text = _live(terminal=True)
    with live:
        live.exchange("local_models", "", 0, 2, 0.0)
        (bar,) = _drawn(live)
        assert bar.startswith("clients: local_models ")
        live.run_ended(_result(0.25, 1.0))
    assert "fedavg: accuracy 25.0%" in text.getvalue()
    assert "seed" not in text.getvalue()
