"""Tables for the terminal and for Markdown."""

from __future__ import annotations

import io
from typing import Any, ClassVar

from rich.console import Console

from fedfuse.report import board_markdown, print_board, print_result


def _console(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system="standard", legacy_windows=False)


def _text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_board_in_a_wide_terminal_is_ranked_and_the_best_federated_accuracy_is_bold(board: dict[str, Any]) -> None:
    console = _console(140)
    print_board(board, console)
    lines = _text(console).splitlines()
    assert "server time" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["centralized", "fusefl", "fedavg", "local"]
    assert "\x1b[1m94.0 ± 1.4 %\x1b[0m" in lines[2]
    assert "1.5 KiB" in lines[2]
    assert "\x1b[1m" not in lines[1]


def test_board_in_a_narrow_terminal_cuts_no_number(board: dict[str, Any]) -> None:
    console = _console(80)
    board["rows"][1]["method"] = "a_very_long_name_of_a_method[with=settings]"
    print_board(board, console)
    text = _text(console)
    assert "94.0 ± 1.4 %" in text
    assert "1 min 15 s" in text
    assert "…" not in text


def test_labels_cannot_inject_markup(board: dict[str, Any]) -> None:
    board["rows"][0]["method"] = "[red]x[/red]"
    console = _console(140)
    print_board(board, console)
    assert "[red]x[/red]" in _text(console)


def test_result_shows_costs_clients_and_who_is_missing(result: dict[str, Any]) -> None:
    console = Console(file=io.StringIO(), width=100)
    print_result(result, console)
    text = _text(console)
    for part in ("90.0 %", "1.5 KiB", "1 min 15 s", "250 ms", "fused model on validation"):
        assert part in text
    assert "client_11 gave no answer: out of memory <b>" in text


def test_empty_tables_print() -> None:
    console = Console(file=io.StringIO(), width=80)
    print_result({}, console)
    print_board({}, console)
    assert "unnamed method" in _text(console)


def test_markdown(board: dict[str, Any]) -> None:
    assert board_markdown(board).splitlines()[:4] == [
        "| method | accuracy | upload | download | exchanges | storage | client time | server time |",
        "|:---|---:|---:|---:|---:|---:|---:|---:|",
        "| centralized | 97.0 ± 0.0 % | 87.9 KiB | 1 KiB | 1 | 8.8 KiB | 1 min 15 s | 250 ms |",
        "| fusefl | **94.0 ± 1.4 %** | 1.5 KiB | 1 KiB | 5 | 8.8 KiB | 1 min 15 s | 250 ms |",
    ]


def test_markdown_escapes_labels() -> None:
    line = board_markdown({"rows": [{"method": "a|b\n<i> [x](y)"}]}).splitlines()[2]
    assert line.startswith("| a\\|b &lt;i> \\[x\\](y) | – |")


class TestScoresBesideTheAccuracy:
    ROWS: ClassVar = [
        {
            "method": "fedit",
            "accuracy_mean": 0.5,
            "num_seeds": 2,
            "metrics_mean": {"perplexity": 7.25, "exact_match": 0.25},
            "metrics_std": {"perplexity": 0.5, "exact_match": 0.01},
        },
        {"method": "local", "accuracy_mean": 0.4, "num_seeds": 2},
    ]

    def test_a_board_has_a_column_for_each(self) -> None:
        lines = board_markdown({"rows": self.ROWS}).splitlines()
        assert lines[0].endswith("| server time | exact match | perplexity |")
        assert lines[2].endswith("| 25.0 ± 1.0 % | 7.25 ± 0.50 |")
        assert lines[3].endswith("| – | – |")

    def test_a_run_has_a_line_for_each(self) -> None:
        result = {"method": "fedit", "accuracy": 0.5, "metrics": {"rouge_l": 0.125, "perplexity": 7.25}}
        console = Console(file=io.StringIO(), width=80)
        print_result(result, console)
        assert "perplexity 7.25 rouge l 12.5 %" in " ".join(_text(console).split())
