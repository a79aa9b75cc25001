"""Files of a run's folder: what is odd becomes None, what is no result is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfuse.core.errors import ConfigError
from fedfuse.report.reading import ExchangeRow, parse_board, parse_run, read_board, read_run

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
RUN_KEYS = st.sampled_from(
    ["method", "accuracy", "class_names", "confusion", "clients", "ledger", "missing", "artifact", "facts", "config"]
)


def test_clients_stand_in_natural_order_and_exchanges_in_order_of_asking(run_folder: Path) -> None:
    run = read_run(run_folder)
    assert [client.name for client in run.clients] == ["client_0", "client_2", "client_10"]
    assert run.exchanges == (
        ExchangeRow("block_0", 3, 2304.0, 1536.0, 6.0, 3),
        ExchangeRow("block_1", 3, 2304.0, 1536.0, 6.0, 0),
    )


def test_lines_that_are_no_curve_or_were_cut_short_are_passed_over(run_folder: Path) -> None:
    curves = read_run(run_folder).curves
    assert len(curves) == 6
    assert curves[0].values == (2.0, 1.0, 0.5)


def test_a_run_without_metrics_and_ledger_can_be_read(run_folder: Path) -> None:
    (run_folder / "metrics.jsonl").unlink()
    (run_folder / "ledger.json").unlink()
    run = read_run(run_folder)
    assert run.curves == ()
    assert run.exchanges == ()
    assert run.accuracy == 0.9


def test_missing_class_names_are_numbered_and_a_crooked_matrix_is_dropped() -> None:
    run = parse_run({"class_names": ["cat"], "confusion": [[1, 2], [3]], "clients": {"a": {"label_counts": [1, 2, 3]}}})
    assert run.class_names == ("cat", "1", "2")
    assert run.confusion == ()
    assert run.clients[0].num_examples == 6


def test_numbers_that_are_not_finite_are_none() -> None:
    run = parse_run({"accuracy": float("nan"), "ledger": {"upload_bytes": float("inf"), "exchanges": 2}})
    assert run.accuracy is None
    assert run.costs == {"exchanges": 2.0}


def test_rank_puts_missing_accuracies_last_and_keeps_the_order_of_ties() -> None:
    rows = [
        {"method": name, "accuracy_mean": value} for name, value in [("a", None), ("b", 0.5), ("c", 0.9), ("d", 0.5)]
    ]
    assert [row.method for row in parse_board({"rows": rows}).ranked] == ["c", "b", "d", "a"]


@given(st.dictionaries(RUN_KEYS, JSON), st.lists(st.dictionaries(st.sampled_from(["curve", "client", "values"]), JSON)))
def test_any_table_makes_a_run(table: dict[str, Any], metrics: list[dict[str, Any]]) -> None:
    run = parse_run(table, metrics, table)
    assert all(len(row) == len(run.confusion) for row in run.confusion)
    assert len(run.class_names) >= len(run.confusion)


@given(st.dictionaries(st.sampled_from(["rows", "seeds", "config"]), JSON | st.lists(st.dictionaries(RUN_KEYS, JSON))))
def test_any_table_makes_a_board(table: dict[str, Any]) -> None:
    assert len(parse_board(table).ranked) == len(parse_board(table).rows)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "cannot read board.json: No such file or directory"),
        ("{", "board.json is no JSON"),
        ("[]", "board.json holds no table"),
    ],
)
def test_a_file_that_is_no_table_is_an_error(tmp_path: Path, content: str | None, what: str) -> None:
    path = tmp_path / "board.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_board(tmp_path)
    assert str(caught.value) == (
        f"{what}\n  where: {path}\n"
        "  fix:   name the folder of a finished `fedfuse run` or `fedfuse compare`, or run the same command again"
    )


def test_a_board_reads_its_rows(tmp_path: Path, board: dict[str, Any]) -> None:
    (tmp_path / "board.json").write_text(json.dumps(board), encoding="utf-8")
    row = read_board(tmp_path).rows[1]
    assert row.method == "fusefl"
    assert row.accuracy == pytest.approx(0.94)
    assert row.spread == pytest.approx(0.02 / 2**0.5)
    assert row.costs["upload_bytes"] == 1536
