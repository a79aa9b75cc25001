"""What a result says in plain words, sentence by sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedfuse.report.reading import parse_board, parse_run
from fedfuse.report.wording import board_headline, leader, method_title, privacy_facts, privacy_lines, run_headline

Row = Callable[..., dict[str, Any]]


def test_comparison_names_best_baseline_and_bounds(board: dict[str, Any]) -> None:
    assert board_headline(parse_board(board)) == [
        (
            "FuseFL reaches 94.0 % (± 1.4 over 2 seeds), 52 points above one-shot FedAvg, "
            "with 1.5 KiB uploaded per client in 5 exchanges."
        ),
        "Training on all data in one place reaches 97.0 %.",
        "A client alone reaches 31.0 % on average.",
    ]


def test_many_rounds_are_not_called_one_shot_and_one_shot_is_preferred(make_row: Row) -> None:
    rows = [make_row("fusefl", [0.9], 10), make_row("fedavg[num_rounds=9]", [0.8], 90, exchanges=9)]
    assert board_headline(parse_board({"rows": rows})) == [
        "FuseFL reaches 90.0 %, 10 points above FedAvg[num_rounds=9], with 10 B uploaded per client in one exchange."
    ]
    rows.append(make_row("fedavg", [0.4], 10))
    assert "50 points above one-shot FedAvg" in board_headline(parse_board({"rows": rows}))[0]


def test_small_leads_are_called_small(make_row: Row) -> None:
    rows = [make_row("a", [0.90, 0.94], 10), make_row("b", [0.90, 0.92], 10)]
    first, second = board_headline(parse_board({"rows": rows}))
    assert first.startswith("a reaches 92.0 % (± 2.8 over 2 seeds), 1.0 points above b")
    assert second == "The lead over b is within the spread of the seeds."
    rows = [make_row("a", [0.9], 10), make_row("b", [0.9], 10)]
    assert "a reaches 90.0 %, level with b, with 10 B" in board_headline(parse_board({"rows": rows}))[0]


def test_clients_alone_may_be_best_and_the_page_says_so(make_row: Row) -> None:
    rows = [make_row("local", [0.95], 10), make_row("fusefl", [0.9], 10)]
    (sentence,) = board_headline(parse_board({"rows": rows}))
    assert sentence == (
        "No method beats training without federation: "
        "a client alone reaches 95.0 % on average, 5.0 points above FuseFL."
    )


def test_pooled_data_leads_only_alone(make_row: Row) -> None:
    board = parse_board({"rows": [make_row("centralized", [0.99], 10), make_row("fedavg", [0.1], 10)]})
    best = leader(board.rows)
    assert best is not None
    assert best.method == "fedavg"
    assert leader(board.rows[:1]) is board.rows[0]
    assert leader([]) is None


@pytest.mark.parametrize(
    ("rows", "sentences"),
    [
        ([], ["The comparison holds no method yet."]),
        (
            [{"method": "a"}],
            ["One method ran without a test set, so there is no accuracy to compare.", "The costs are below."],
        ),
    ],
)
def test_comparisons_without_accuracy(rows: list[dict[str, Any]], sentences: list[str]) -> None:
    assert board_headline(parse_board({"rows": rows})) == sentences


def test_run_names_accuracy_cost_and_who_is_missing(result: dict[str, Any]) -> None:
    assert run_headline(parse_run(result)) == [
        "FuseFL reaches 90.0 % on the test set, with 1.5 KiB uploaded per client in 2 exchanges.",
        "1 of 4 clients gave no answer.",
    ]


def test_run_without_a_test_set() -> None:
    assert run_headline(parse_run({"method": "mine", "clients": {"a": {}}})) == [
        "mine ran with 1 client.",
        "There is no test accuracy: the data has no test part, or nothing came out that could be scored.",
    ]


def test_run_of_clients_on_their_own() -> None:
    clients = {"a": {"accuracy": 0.4, "accuracy_kind": "own model on test"}}
    assert run_headline(parse_run({"method": "local", "accuracy": 0.4, "clients": clients})) == [
        "Local: the clients' own models reach 40.0 % on average on the test set."
    ]


def test_labels_keep_their_settings() -> None:
    assert method_title("co_boosting[epochs=3]") == "Co-Boosting[epochs=3]"
    assert method_title("somebody's") == "somebody's"


def test_the_numbers_of_a_guarantee_are_readable() -> None:
    guarantee = {"mechanism": "local", "epsilon": 2.0 / 3, "delta": 1e-5, "noise": "secret", "lines": ["Kept."]}
    run = parse_run({"privacy": guarantee})
    assert privacy_lines(run) == ["Kept."]
    assert privacy_facts(run) == [
        ("mechanism", "local"),
        ("epsilon", "0.666667"),
        ("delta", "1e-05"),
        ("the noise comes from", "a secret"),
    ]
    # Nothing was asked for, or the file is odd.
    for odd in ({}, {"privacy": None}, {"privacy": {"lines": "x"}}):
        assert privacy_lines(parse_run(odd)) == []
    # Spent without a bound.
    assert privacy_facts(parse_run({"privacy": {"epsilon": None}})) == []
