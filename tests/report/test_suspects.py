"""Uploads that look wrong and attacks, in words and in tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from fedfuse.report.suspects import MOST_PRINTED, SuspectRow, read_suspects, suspect_lines, suspect_sentences
from fedfuse.report.tables import board_markdown, print_board, print_result
from fedfuse.report.units import format_percent

ROW = SuspectRow("b", "ask", "it goes 9 times as far as is usual here")


def printed(function: Any, table: dict[str, Any]) -> str:
    console = Console(record=True, width=140, force_terminal=False)
    function(table, console)
    return console.export_text()


def test_what_is_no_table_is_passed_over() -> None:
    assert read_suspects({}) == []
    assert read_suspects({"suspects": "x"}) == []
    assert read_suspects({"suspects": [3, {"client": "b", "exchange": None, "reason": "r"}]}) == [
        SuspectRow("b", "", "r")
    ]


def test_lines_and_sentences() -> None:
    assert suspect_lines([]) == []
    assert suspect_lines([ROW]) == ["the upload of b in ask looks wrong: it goes 9 times as far as is usual here"]
    many = suspect_lines([ROW] * (MOST_PRINTED + 2))
    assert len(many) == MOST_PRINTED + 1
    assert many[-1] == "2 more uploads that look wrong are in the report"
    assert suspect_sentences([]) == []
    assert suspect_sentences([ROW, ROW]) == ["What one client sent looks wrong."]
    assert suspect_sentences([ROW, SuspectRow("c", "ask", "r")]) == ["What 2 clients sent looks wrong."]


def test_a_result_tells_suspects_and_the_success_of_an_attack() -> None:
    text = printed(
        print_result,
        {
            "method": "fedavg",
            "accuracy": 0.5,
            "suspects": [{"client": "[b]", "exchange": "ask", "reason": "odd"}],
            "attack": {"name": "backdoor", "clients": ["b"], "success": 0.25},
        },
    )
    assert "attack success" in text
    assert format_percent(0.25) in text
    assert "the upload of [b] in ask looks wrong: odd" in text
    assert "attack" not in printed(print_result, {"method": "fedavg", "accuracy": 0.5})


def test_a_board_has_a_column_for_it_only_where_there_was_one() -> None:
    plain = {"method": "a", "accuracy_mean": 0.5, "num_seeds": 1}
    attacked = {**plain, "method": "b", "attack_success_mean": 0.125}
    assert "attack success" not in board_markdown({"rows": [plain]})
    lines = board_markdown({"rows": [attacked, plain]}).splitlines()
    assert lines[0].endswith("| attack success |")
    assert lines[1].count("|") == lines[2].count("|") == lines[3].count("|")
    assert lines[2].endswith(f"| {format_percent(0.125)} |")
    assert lines[3].endswith("| – |")
    assert "attack success" in printed(print_board, {"rows": [attacked]})
    assert "attack success" not in printed(print_board, {"rows": [plain]})
