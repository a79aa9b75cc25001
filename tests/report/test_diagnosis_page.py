"""The page and the pictures of a diagnosis."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from fedfuse.core.errors import ConfigError
from fedfuse.report.diagnosis_page import diagnosis_headline, write_diagnosis
from fedfuse.report.diagnosis_reading import parse_diagnosis
from fedfuse.report.plots.one_round import gap_over_settings, loss_between, update_cosines


def setting(width: int, gap: float, verdict: str, *, measured: bool = True, num_clients: int = 3) -> dict[str, Any]:
    clients = [f"client_{k}" for k in range(num_clients)]
    return {
        "varied": {"model.width": width},
        "diagnosis": {
            "num_parameters": 10 * width,
            "predicted_gap": gap,
            "mean_length": 2.0,
            "product": 100.0 / width,
            "smoothness": 4.0 / width,
            "update_size": 0.1,
            "num_steps": 20,
            "num_clients": num_clients,
            "start_length": 5.0,
            "step_bound": None,
            "verdict": verdict,
            "sentences": [f"Words on <width {width}>."],
        },
        "predicted_gaps": [gap - 0.01, gap + 0.01],
        "clients": clients,
        "cosines": [[1.0 if a == b else -0.7 for b in clients] for a in clients],
        "lines": [
            {"from": "start", "to": "mean", "places": [0, 0.5, 1], "losses": [2.0, 1.5, 1.0]},
            {"from": "client_0", "to": "client_1", "places": [0, 0.5, 1], "losses": [1.2, 1.0, 1.1]},
        ],
        "measured": {
            "distance": 0.5,
            "accuracy_one": 0.8,
            "accuracy_many": 0.85,
            "accuracy_one_by_seed": [0.79, 0.81],
            "accuracy_many_by_seed": [0.84, 0.86],
            "accuracy_gap": 0.05,
            "upload_bytes_one": 1024,
            "upload_bytes_many": 10240,
        }
        if measured
        else None,
    }


def table(*settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "settings": list(settings),
        "num_rounds": 10,
        "near": 0.2,
        "far": 0.5,
        "method": "fedavg",
        "seeds": [0, 1],
        "config": {"seed": 0},
        "versions": {"fedfuse": "0.1.0"},
    }


def write(folder: Path, content: dict[str, Any]) -> str:
    (folder / "diagnosis.json").write_text(json.dumps(content), encoding="utf-8")
    return write_diagnosis(folder).read_text(encoding="utf-8")


def test_the_page_says_everything_and_needs_nothing_else(tmp_path: Path) -> None:
    html = write(tmp_path, table(setting(4, 0.6, "not_enough"), setting(16, 0.1, "enough")))
    assert "One round should be enough with width 16." in html
    assert "It is not enough with width 4." in html
    assert "Words on &lt;width 4&gt;." in html
    assert '<td data-value="0.25">25.0 %</td>' in html
    assert set(re.findall(r"https?://[^\s\"'<>]+", html)) <= {"http://www.w3.org/2000/svg"}
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    names = ["gap", "losses-width-4", "losses-width-16", "cosines-width-4", "cosines-width-16"]
    assert figures == {f"{name}.{end}" for name in names for end in ("png", "svg")}


def test_one_setting_without_a_measurement_has_no_comparison(tmp_path: Path) -> None:
    content = table({**setting(4, 0.3, "open", measured=False), "varied": {}})
    html = write(tmp_path, content)
    assert "Words on" in html
    assert "Gap and bound" not in html
    assert not (tmp_path / "figures" / "gap.png").exists()


def test_the_headline_begins_with_what_is_enough() -> None:
    only = parse_diagnosis(table(setting(4, 0.6, "not_enough"), setting(8, 0.7, "not_enough")))
    assert diagnosis_headline(only) == ["One round is not enough with width 4; width 8."]
    mixed = parse_diagnosis(table(setting(4, 0.3, "open"), setting(8, 0.1, "enough")))
    assert diagnosis_headline(mixed) == ["One round should be enough with width 8.", "It may be enough with width 4."]
    assert diagnosis_headline(parse_diagnosis({})) == ["Nothing was diagnosed."]


def test_the_measured_gap_is_a_share_of_how_far_one_round_went() -> None:
    first, second = parse_diagnosis(table(setting(4, 0.3, "open"), setting(8, 0.3, "open", measured=False))).settings
    assert first.measured_gap == 0.25
    assert second.measured_gap is None


def test_the_picture_shows_gaps_accuracies_and_terms() -> None:
    board = parse_diagnosis(table(setting(4, 0.6, "not_enough"), setting(16, 0.1, "enough")))
    figure = gap_over_settings(board.settings, board.near, board.far)
    gaps, accuracies, terms = figure.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in gaps.lines}
    assert lines["predicted"] == [0.6, 0.1]
    assert lines["measured"] == [0.25, 0.25]
    assert {line.get_label(): list(line.get_ydata()) for line in accuracies.lines}["many rounds"] == [0.85, 0.85]
    # From width 4 to 16 the bound and L fall to a quarter: two powers of two.
    powers = {line.get_label(): list(line.get_ydata()) for line in terms.lines}
    assert powers["the bound: L τ Tk m |w0|"] == [0.0, -2.0]
    assert powers["m, clients"] == [0.0, 0.0]
    assert [text.get_text() for text in gaps.get_xticklabels()] == ["width 4\n40 trained", "width 16\n160 trained"]


def test_two_varied_settings_make_a_line_for_each_choice_of_the_other() -> None:
    rows = []
    for width, dirichlet_alpha, gap in ((4, 0.1, 0.9), (4, 10, 0.4), (8, 0.1, 0.8), (8, 10, 0.2)):
        row = setting(width, gap, "open")
        row["varied"] = {"data.partition.dirichlet_alpha": dirichlet_alpha, "model.width": width}
        rows.append(row)
    figure = gap_over_settings(parse_diagnosis(table(*rows)).settings, 0.2, 0.5)
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert lines["predicted, dirichlet_alpha 0.1"] == [0.9, 0.8]
    assert lines["predicted, dirichlet_alpha 10"] == [0.4, 0.2]
    ticks = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert ticks == ["width 4\n40 trained", "width 8\n80 trained"]


@pytest.mark.parametrize("num_clients", [1, 2, 30])
def test_few_and_many_clients_and_nothing(num_clients: int) -> None:
    board = parse_diagnosis(table(setting(4, 0.6, "open", num_clients=num_clients)))
    for figure in (
        update_cosines(board.settings[0]),
        loss_between(board.settings[0]),
        gap_over_settings(board.settings, 0.2, 0.5),
        gap_over_settings([], 0.2, 0.5),
    ):
        figure.draw_without_rendering()


def test_odd_numbers_break_nothing(tmp_path: Path) -> None:
    broken = setting(4, 0.6, "odd")
    broken["diagnosis"].update(product=0, smoothness=None, predicted_gap=None)
    broken["lines"], broken["predicted_gaps"] = [], [math.nan]
    assert "not known" not in write(tmp_path, table(broken, setting(8, 0.1, "enough")))


def test_a_folder_without_a_diagnosis(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read diagnosis\.json: No such file or directory"):
        write_diagnosis(tmp_path)
