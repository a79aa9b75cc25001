"""Which method to choose: every sentence, against made-up measurements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedfuse.report.advice import Constraints, advise, typical_constraints
from fedfuse.report.reading import parse_board

Row = Callable[..., dict[str, Any]]


def known(row: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """A line of a board that says what its method needs."""
    return {"needs_server_data": False, "takes_heterogeneous": True, **row, **facts}


def measured(make_row: Row) -> dict[str, Any]:
    rows = [
        known(make_row("fusefl", [0.93, 0.95], 2048, client_seconds=3.0, server_seconds=1.0)),
        known(make_row("feddf", [0.94, 0.92], 1024, client_seconds=2.0, server_seconds=9.0), needs_server_data=True),
        known(make_row("fedavg", [0.40, 0.44], 1024, client_seconds=2.0), takes_heterogeneous=False),
        known(make_row("ensemble", [0.60, 0.62], 1024, client_seconds=2.0)),
        known(make_row("local", [0.30, 0.32], 1024)),
        known(make_row("centralized", [0.97, 0.97], 90000)),
    ]
    return {"rows": rows, "seeds": [0, 1], "config": {}}


def test_the_best_is_named_with_its_numbers_and_the_level_runner_up(make_row: Row) -> None:
    assert advise(parse_board(measured(make_row)), Constraints()) == [
        (
            "Choose FuseFL: 94.0 ± 1.4 % test accuracy over 2 seeds, 2 KiB up per client, 4.0 s of computing. "
            "FedDF is level within one spread: 93.0 ± 1.4 % test accuracy over 2 seeds, 1 KiB up per client, "
            "11 s of computing. "
            "Left out: Centralized (uploads the raw data); Local (gives no common model)."
        )
    ]


def test_each_constraint_says_whom_it_excludes(make_row: Row) -> None:
    board = parse_board(measured(make_row))
    (line,) = advise(board, Constraints(max_upload_bytes=1500))
    assert line.startswith("Choose FedDF: ")
    assert "FuseFL (uploads more than 1.5 KiB)" in line
    assert "Next is Ensemble, 32.0 points behind." in line
    (line,) = advise(board, Constraints(1500, has_server_data=False))
    assert line.startswith("Choose Ensemble: 61.0 ± 1.4 % test accuracy over 2 seeds, 1 KiB up per client")
    assert "FedDF (needs data at the server)" in line
    (line,) = advise(board, Constraints(is_heterogeneous=True))
    assert line.startswith("Choose FuseFL: ")
    assert "FedAvg (needs one architecture)" in line
    assert line.endswith("This was measured with one architecture for all clients.")
    (line,) = advise(board, Constraints(budget_s=3.5))
    assert line.startswith("Choose Ensemble: ")
    assert "FuseFL, FedDF (computes longer than 3.5 s)" in line
    (line,) = advise(board, Constraints(max_upload_bytes=10))
    assert line == (
        "No method that was measured fits: Centralized (uploads the raw data); "
        "FuseFL, FedDF, Ensemble, FedAvg (uploads more than 10 B); Local (gives no common model)."
    )


def test_one_seed_training_alone_and_what_is_not_known(make_row: Row) -> None:
    rows = [make_row("mine", [0.5], 10), make_row("other", [0.45], 10), make_row("local", [0.6], 10)]
    board = parse_board({"rows": rows, "seeds": [0]})
    assert advise(board, Constraints()) == [
        (
            "Choose mine: 50.0 % test accuracy with one seed, 10 B up per client, 1 min 15 s of computing. "
            "other is 5.0 points behind; one seed says nothing about the spread. "
            "But a client alone reaches 60.0 % on average. "
            "Left out: Local (gives no common model)."
        )
    ]
    (line,) = advise(board, Constraints(is_heterogeneous=True))
    assert line.startswith("No method that was measured fits: ")
    assert "mine, other (not known whether it takes clients with different models)" in line
    (line,) = advise(parse_board({"rows": [make_row("a", [0.5], None)]}), Constraints(max_upload_bytes=10))
    assert line == "No method that was measured fits: a (not known whether it uploads more than 10 B)."
    assert advise(parse_board({}), Constraints()) == ["No method that was measured fits: the board is empty."]


def test_what_the_board_was_measured_with_is_said(make_row: Row) -> None:
    table = measured(make_row)
    table["config"] = {"data": {"server": {"fraction": 0.1}}, "model": {"clients": {"client_0": {}}}}
    (line,) = advise(parse_board(table), Constraints(has_server_data=False, is_heterogeneous=True))
    assert line.startswith("Choose FuseFL: ")
    table["rows"][0]["used_server_data"] = True
    (line,) = advise(parse_board(table), Constraints(has_server_data=False, is_heterogeneous=True))
    assert line.startswith("Choose Ensemble: ")
    assert "FuseFL (was measured with data at the server)" in line
    (line,) = advise(parse_board(measured(make_row)), Constraints(has_server_data=True))
    assert line.endswith("This was measured without data at the server.")
    table["seeds"] = [0, 1, 2]
    (line,) = advise(parse_board(table), Constraints())
    assert line.endswith("The comparison is not finished: some seeds are missing.")


def test_each_setting_has_a_line_of_its_own(make_row: Row) -> None:
    key = "data.partition.dirichlet_alpha"
    rows = [
        known(make_row("fedavg", [accuracy], 10), varied={key: alpha}) for alpha, accuracy in ((0.1, 0.4), (0.5, 0.8))
    ]
    lines = advise(parse_board({"rows": rows, "varied": {key: [0.1, 0.5]}}), Constraints())
    assert [line.partition(" test")[0] for line in lines] == [
        "dirichlet_alpha 0.1: Choose FedAvg: 40.0 %",
        "dirichlet_alpha 0.5: Choose FedAvg: 80.0 %",
    ]


def test_typical_constraints_take_one_model_s_upload_from_the_board(make_row: Row) -> None:
    found = typical_constraints(parse_board(measured(make_row)))
    assert [constraints.in_words() for constraints in found] == [
        "no limits",
        "clients with different models, no data at the server",
        "at most 1 KiB up per client, no data at the server",
    ]
    assert typical_constraints(parse_board({}))[2].max_upload_bytes is None
