"""The page of a run and of a comparison, whole, with odd data, and with hostile names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedfuse.core.errors import ConfigError
from fedfuse.report import write_report

MakeRun = Callable[..., Path]


class _Page(HTMLParser):
    """Checks that tags close, and collects what a test asks for."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.headings: list[str] = []
        self.alternatives: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name == "id":
                self.ids.append(value or "")
            if name in {"href", "src"}:
                self.addresses.append(value or "")
            if tag == "svg" and name == "aria-label":
                self.alternatives.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in {"h1", "h2"}:
            self.headings.append(data)


def _read(path: Path) -> _Page:
    return _Page(path.read_text(encoding="utf-8"))


def test_a_run_has_every_section(run_folder: Path) -> None:
    path = write_report(run_folder)
    page = _read(path)
    assert path == run_folder / "report.html"
    assert page.headings == [
        "FuseFL reaches 90.0 % on the test set, with 1.5 KiB uploaded per client in 2 exchanges.",
        "Who holds what",
        "Client by client",
        "Which classes are confused",
        "How the clients learnt",
        "What it cost",
        "What left the clients",
        "What the method reports",
        "Configuration",
        "Versions",
    ]
    names = ["who-holds-what", "clients", "confusion", "curves-train_loss", "exchanges"]
    expected = sorted(f"{name}.{ending}" for name in names for ending in ("png", "svg"))
    assert sorted(file.name for file in (run_folder / "figures").iterdir()) == expected
    assert len(page.alternatives) == len(names)
    assert all(page.alternatives)
    assert "right in 80.0 %" in next(text for text in page.alternatives if text.startswith("Confusion"))


def test_a_comparison_has_every_section(board_folder: Path) -> None:
    page = _read(board_folder / "report.html")
    assert page.headings[1:] == [
        "Who holds what",
        "Accuracy of each method",
        "Accuracy against what a client uploads",
        "Accuracy against what the server computes",
        "Method by method",
        "What each method costs",
        "What left the clients",
        "Configuration",
        "Versions",
        "Which method to choose",
    ]
    names = {file.stem for file in (board_folder / "figures").iterdir()}
    assert {"who-holds-what", "accuracy", "accuracy-against-upload", "costs"} <= names
    assert {"clients-fusefl", "confusion-fusefl", "curves-fusefl-train_loss", "clients-fedavg"} <= names
    # The runs of centralized are lost: its numbers are still there.
    assert not any("centralized" in name for name in names)
    assert "97.0 ± 0.0 %" in (board_folder / "report.html").read_text(encoding="utf-8")


def test_the_page_needs_nothing_from_outside_and_its_ids_are_unique(board_folder: Path) -> None:
    path = board_folder / "report.html"
    page = _read(path)
    # The one address that leaves the page leads to the page of a run in a folder of the comparison.
    assert [address for address in page.addresses if not address.startswith("#")] == ["fusefl/seed_0/report.html"]
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    outside = re.findall(r"https?://[^\s\"'<>]+", path.read_text(encoding="utf-8"))
    assert set(outside) <= {"http://www.w3.org/2000/svg"}


def test_hostile_names_stay_text(run_folder: Path, hostile: str) -> None:
    html = write_report(run_folder).read_text(encoding="utf-8")
    page = _Page(html)
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert hostile not in html
    assert "out of memory &lt;b&gt;" in html


def test_the_same_files_give_the_same_page(run_folder: Path) -> None:
    first = write_report(run_folder).read_bytes()
    assert write_report(run_folder).read_bytes() == first


def test_a_run_of_which_little_is_known(tmp_path: Path, make_run: MakeRun) -> None:
    folder = make_run(tmp_path / "a", accuracy=None, class_names=[], clients={}, ledger={}, missing={}, config={})
    (folder / "metrics.jsonl").unlink()
    (folder / "ledger.json").unlink()
    page = _read(write_report(folder))
    assert page.headings == ["FuseFL ran with 0 clients.", "What it cost", "What the method reports", "Versions"]


@pytest.mark.parametrize("table", [{}, {"clients": 3, "confusion": [[1], []], "accuracy": "high", "config": [1]}])
def test_a_run_with_odd_data(tmp_path: Path, table: dict[str, Any]) -> None:
    (tmp_path / "result.json").write_text(json.dumps(table), encoding="utf-8")
    assert _read(write_report(tmp_path)).headings == ["unnamed method ran with 0 clients."]


@pytest.mark.parametrize(
    ("table", "headings"),
    [
        ({}, ["The comparison holds no method yet."]),
        (
            {"rows": [{"method": "fedavg", "accuracy_mean": None, "upload_bytes": 5}]},
            ["One method ran without a test set, so there is no accuracy to compare.", "What each method costs"],
        ),
        (
            {"rows": [{"method": "fedavg", "accuracy_mean": 0.5, "runs": ["gone"]}], "seeds": [0]},
            [
                "FedAvg reaches 50.0 %.",
                "Accuracy of each method",
                "What each method costs",
                "Which method to choose",
            ],
        ),
    ],
)
def test_a_comparison_with_odd_data(tmp_path: Path, table: dict[str, Any], headings: list[str]) -> None:
    (tmp_path / "board.json").write_text(json.dumps(table), encoding="utf-8")
    assert _read(write_report(tmp_path)).headings == headings


def test_runs_outside_the_folder_are_not_read(tmp_path: Path, make_run: MakeRun) -> None:
    make_run(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "report.html").write_text("", encoding="utf-8")
    folder = tmp_path / "comparison"
    folder.mkdir()
    row = {"method": "a", "accuracy_mean": 0.5, "runs": ["../elsewhere"]}
    (folder / "board.json").write_text(json.dumps({"rows": [row]}), encoding="utf-8")
    page = _read(write_report(folder))
    assert "Method by method" not in page.headings
    assert [address for address in page.addresses if not address.startswith("#")] == []


def test_methods_whose_labels_differ_in_signs_only_get_pictures_of_their_own(tmp_path: Path, make_run: MakeRun) -> None:
    make_run(tmp_path / "one")
    make_run(tmp_path / "two")
    rows = [
        {"method": "a b", "accuracy_mean": 0.5, "runs": ["one"]},
        {"method": "a/b", "accuracy_mean": 0.4, "runs": ["two"]},
    ]
    (tmp_path / "board.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    page = _read(write_report(tmp_path))
    assert len(page.ids) == len(set(page.ids))
    assert {"clients-a-b.svg", "clients-a-b-2.svg"} <= {file.name for file in (tmp_path / "figures").iterdir()}


def test_a_folder_without_a_result_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        write_report(tmp_path)
    assert str(caught.value) == (
        "there is nothing to report: neither result.json nor board.json is there\n"
        f"  where: {tmp_path}\n"
        "  fix:   name the folder of a finished `fedfuse run` or `fedfuse compare`"
    )


def test_a_comparison_of_several_settings(tmp_path: Path, make_row: Callable[..., dict[str, Any]]) -> None:
    key = "data.partition.dirichlet_alpha"
    rows = []
    for alpha in (0.1, 0.5):
        part = [
            make_row("fedavg", [alpha, alpha + 0.1], 1000),
            make_row("fusefl", [0.8, 0.8], 2000),
            make_row("local", [0.2, 0.2], 1000),
        ]
        folder = tmp_path / f"dirichlet_alpha={alpha}"
        folder.mkdir()
        (folder / "board.json").write_text(json.dumps({"rows": part, "seeds": [0, 1]}), encoding="utf-8")
        for row in part:
            rows.append({**row, "varied": {key: alpha}, "runs": [f"{folder.name}/{run}" for run in row["runs"]]})
    table = {
        "rows": rows,
        "seeds": [0, 1],
        "varied": {key: [0.1, 0.5, 0.9]},
        "boards": ["dirichlet_alpha=0.1", "dirichlet_alpha=0.5", "..", "gone"],
    }
    (tmp_path / "board.json").write_text(json.dumps(table), encoding="utf-8")
    page = _read(write_report(tmp_path))
    assert page.headings == [
        "FuseFL is the most accurate in 2 of 2 settings.",
        "Accuracy against dirichlet_alpha",
        "All methods on all settings",
        "Which method to choose",
    ]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "1 of 3 settings are not there yet: the same command continues." in text
    assert "dirichlet_alpha 0.5: no limits" in text
    assert (tmp_path / "figures" / "accuracy-against-dirichlet_alpha.png").is_file()
    # Each setting has a page of its own, and the table leads there.
    addresses = {address for address in page.addresses if not address.startswith("#")}
    assert addresses == {"dirichlet_alpha%3D0.1/report.html", "dirichlet_alpha%3D0.5/report.html"}
    assert _read(tmp_path / "dirichlet_alpha=0.1" / "report.html").headings[0].startswith("FuseFL reaches 80.0 %")
