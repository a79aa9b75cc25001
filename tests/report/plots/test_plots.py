"""Each picture with few and many of everything, and with nothing."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from fedfuse.report import plots
from fedfuse.report.plots.accuracy import pareto_front
from fedfuse.report.plots.curves import shown_exchanges
from fedfuse.report.plots.labels import overlap, place_numbers, spread_out
from fedfuse.report.plots.style import new_figure
from fedfuse.report.reading import Board, BoardRow, ClientRow, Curve, ExchangeRow


def _row(method: str, accuracy: float | None, upload: float, accuracies: tuple[float, ...] = ()) -> BoardRow:
    return BoardRow(method, accuracy, 0.01, accuracies, max(len(accuracies), 1), {"upload_bytes": upload}, ())


def _texts(figure: Figure) -> set[str]:
    import matplotlib.text

    return {text.get_text() for text in figure.findobj(matplotlib.text.Text)}


@pytest.mark.parametrize(("num_clients", "num_classes"), [(1, 1), (3, 2), (30, 30), (100, 100), (3, 100), (100, 2)])
def test_who_holds_what_for_few_and_many(tmp_path: Path, num_clients: int, num_classes: int) -> None:
    counts = {f"client_{k}": list(range(k, k + num_classes)) for k in range(num_clients)}
    figure = plots.who_holds_what(counts, [f"class {k}" for k in range(num_classes)])
    matrix, totals = figure.axes
    assert bool(matrix.images) == (max(num_clients, num_classes) > 30)
    assert [bar.get_width() for bar in totals.patches] == [sum(counts[f"client_{k}"]) for k in range(num_clients)]
    plots.save_figure(figure, tmp_path, "holdings")


def test_who_holds_what_area_is_the_number_of_examples() -> None:
    figure = plots.who_holds_what({"a": [4, 0], "b": [1]}, ["x", "y"])
    sizes = figure.axes[0].collections[0].get_sizes()
    assert sizes[0] / sizes[1] == pytest.approx(4)


def test_accuracy_is_ranked_and_written() -> None:
    rows = [_row("low", 0.4, 1), _row("none", None, 1), _row("fusefl", 0.9, 1, (0.89, 0.91))]
    figure = plots.accuracy_by_method(rows)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["low", "FuseFL"]
    assert {"40.0 %", "90.0 ± 1.0 %"} <= _texts(figure)


def test_uploads_of_nothing_stand_left_of_all_others() -> None:
    figure = plots.accuracy_against_cost([_row("silent", 0.4, 0), _row("loud", 0.9, 4096)])
    assert {"silent", "loud", "nothing", "4 KiB"} <= _texts(figure)


def test_no_front_holds_a_beaten_method_or_pooled_data() -> None:
    rows = [_row("a", 0.6, 10), _row("b", 0.6, 10), _row("c", 0.6, 11), _row("d", 0.9, 99), _row("centralized", 1, 1)]
    assert [row.method for row in pareto_front(rows)] == ["a", "b", "d"]


def test_confusion_rows_are_shares_and_empty_rows_say_so() -> None:
    figure = plots.confusion_matrix([[3, 1], [0, 0]], ["cat", "dog"])
    assert {"75", "25", "cat", "dog", "no test examples"} <= _texts(figure)


@pytest.mark.parametrize("num_classes", [1, 12, 13, 31, 100])
def test_confusion_of_many_classes(tmp_path: Path, num_classes: int) -> None:
    figure = plots.confusion_matrix(np.eye(num_classes).tolist(), [])
    assert ("100" in _texts(figure)) == (num_classes <= 12)
    plots.save_figure(figure, tmp_path, "confusion")


def test_client_bars_mark_who_is_missing() -> None:
    clients = [ClientRow("client_0", 5, (5,), 0.5, "own model on test"), ClientRow("client_1", 7, (7,), None, "")]
    figure = plots.client_bars(clients, {"client_2": "gone"}, 0.6)
    assert {"50 %", "5", "7", "test\n60.0 %", "× gave no answer", "client_2"} <= _texts(figure)
    assert len(figure.axes) == 2


def test_client_bars_say_where_a_validation_part_is_not_counted() -> None:
    whole, split = ClientRow("a", 5, (5,), None, ""), ClientRow("a", 4, (5,), None, "")
    assert plots.client_bars([whole]).axes[0].get_title("left") == "training examples"
    assert plots.client_bars([split]).axes[0].get_title("left") == "training examples, without the validation part"


def test_client_bars_without_accuracy_are_one_panel() -> None:
    assert len(plots.client_bars([ClientRow("a", 5, (5,), None, "")]).axes) == 1


def test_curves_have_a_panel_an_exchange_and_a_line_a_client() -> None:
    curves = [Curve(f"block_{k}", f"client_{c}", "train_loss", (2.0, 1.0)) for k in range(5) for c in range(3)]
    figure = plots.learning_curves(curves)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [f"block_{k}" for k in range(5)]
    assert [len(axes.lines) for axes in figure.axes] == [3] * 5


def test_many_clients_get_a_median_and_gaps_do_no_harm(tmp_path: Path) -> None:
    curves = [
        Curve("a", f"client_{c}", "validation_accuracy", (float("nan"), 0.5, 0.7)[: 1 + c % 3]) for c in range(20)
    ]
    figure = plots.learning_curves(curves, "validation_accuracy")
    assert len(figure.axes[0].lines) == 21
    plots.save_figure(figure, tmp_path, "curves")


def test_of_many_exchanges_first_and_last_are_shown() -> None:
    names = [f"round_{k}" for k in range(50)]
    shown = shown_exchanges(names)
    assert (len(shown), shown[0], shown[-1]) == (12, "round_0", "round_49")
    assert shown_exchanges(names[:12]) == names[:12]


def test_costs_are_written_beside_their_bars() -> None:
    assert {"1.5 KiB", "upload per client"} <= _texts(plots.cost_bars([_row("a", 0.5, 1536), _row("b", 0.4, 10)]))
    exchanges = [ExchangeRow("block_0", 2, 4096.0, 2048.0, 1.0, 0)]
    assert {"2 KiB", "1 KiB", "block_0"} <= _texts(plots.exchange_bars(exchanges))


@pytest.mark.parametrize(
    ("draw", "reason"),
    [
        (lambda: plots.who_holds_what({}, []), "The run does not say which client holds which classes."),
        (lambda: plots.accuracy_by_method([]), "No method was scored: there is no test set."),
        (lambda: plots.accuracy_against_cost([]), "No method has both an accuracy and an upload size."),
        (
            lambda: plots.confusion_matrix([], []),
            "There is no confusion matrix: the model was not scored on a test set.",
        ),
        (lambda: plots.client_bars([]), "The run names no client."),
        (lambda: plots.learning_curves([]), "The run logged no training loss."),
        (lambda: plots.cost_bars([]), "The costs were not counted."),
        (lambda: plots.exchange_bars([]), "The ledger of this run is not there."),
    ],
)
def test_nothing_to_draw_is_said(draw: Callable[[], Figure], reason: str) -> None:
    assert _texts(draw()) == {reason}


def test_the_same_figure_gives_the_same_bytes_whatever_the_readers_settings(tmp_path: Path) -> None:
    def save(folder: str) -> list[bytes]:
        figure = plots.who_holds_what({"a": [4, 0], "b": [1, 1]}, ["x", "y"])
        return [path.read_bytes() for path in plots.save_figure(figure, tmp_path / folder, "holdings")]

    first = save("one")
    with mpl.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        assert save("two") == first
    assert b"<dc:date>" not in first[1]


def test_names_in_any_script_draw_without_a_warning_and_math_stays_text(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plots.who_holds_what({"患者": [1, 2]}, ["$x^2$ 日本", "a\nb"])
        _, svg = plots.save_figure(figure, tmp_path, "scripts")
    text = svg.read_text(encoding="utf-8")
    assert "$x^2$ 日本" in text
    assert "患者" in text


def test_no_picture_stays_open() -> None:
    import matplotlib.pyplot as plt

    plots.accuracy_by_method([_row("a", 0.5, 1)])
    assert plt.get_fignums() == []


def test_many_methods_are_numbered_by_rank_and_named_in_a_list() -> None:
    rows = [_row(f"method_{i:02d}", 0.3 + 0.02 * i, 1000 if i % 3 else 4000, (0.3, 0.4)) for i in range(30)]
    for cost in ("upload_bytes", "server_seconds"):
        figure = plots.accuracy_against_cost(
            [replace(row, costs={**row.costs, "server_seconds": 10.0 ** (i % 4 - 2)}) for i, row in enumerate(rows)],
            cost,
        )
        assert {*map(str, range(1, 31)), *(row.method for row in rows)} <= _texts(figure)
        listed = [text.get_text() for text in figure.axes[1].texts]
        assert listed[:3] == ["1", "method_29", "88.0"]


@pytest.mark.parametrize("count", [11, 30])
def test_numbers_do_not_cover_each_other(count: int) -> None:
    figure = new_figure(6)
    axes = figure.subplots()
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 1)
    points = [(5.0 if i % 3 else 5.3, 0.5 + 0.001 * i) for i in range(count)]
    boxes = place_numbers(axes, points, ["#000000"] * count)
    assert all(overlap(a, b) < 1e-6 for i, a in enumerate(boxes) for b in boxes[:i])


@given(st.lists(st.floats(0, 500), min_size=1, max_size=30))
def test_heights_are_spread_out_in_order(heights: list[float]) -> None:
    falling = sorted(heights, reverse=True)
    found = spread_out(falling, 10, 0, 500)
    assert len(found) == len(falling)
    assert all(a - b >= 10 - 1e-6 for a, b in itertools.pairwise(found))
    assert found[0] <= 500 + 1e-6
    assert found[-1] >= -1e-6


def test_heights_with_room_stay() -> None:
    assert spread_out([30.0, 19.0, 5.0], 10, 0, 100) == [30.0, 19.0, 5.0]


def _varied_board(methods: Sequence[str], values: Sequence[float], others: Sequence[int] = ()) -> Board:
    rows = []
    for label in methods:
        for value in values:
            for other in others or [0]:
                varied = {"data.alpha": value, **({"data.clients": other} if others else {})}
                rows.append(replace(_row(label, 0.5 + value / 10, 10), varied=varied))
    varied_settings: dict[str, tuple[Any, ...]] = {"data.alpha": tuple(values)}
    if others:
        varied_settings["data.clients"] = tuple(others)
    return Board(tuple(rows), ("0",), {}, {}, varied_settings)


def test_a_setting_has_a_line_per_method_and_a_panel_per_other_value() -> None:
    board = _varied_board(["fedavg", "fusefl"], [0.1, 0.4], [5, 10])
    figure = plots.accuracy_against_setting(board, "data.alpha")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["clients 5", "clients 10"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["FedAvg", "FuseFL"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0.1", "0.4"]
    # Positive numbers stand on a logarithmic axis: 0.4 is two doublings from 0.1.
    assert np.diff(figure.axes[0].get_xticks()).tolist() == pytest.approx([2.0])


def test_more_lines_than_colours_are_grey_but_known_ones_are_told() -> None:
    board = _varied_board([*(f"m{i:02d}" for i in range(29)), "fedavg"], [0.1, 0.4])
    figure = plots.accuracy_against_setting(board, "data.alpha")
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(names) == 13
    assert names[-1] == "18 others"
    assert "FedAvg" in names
