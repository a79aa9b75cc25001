"""Sheets of drawings: a line for each class, and files that cannot be shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedfuse.core.payload import Payload
from fedfuse.report import plots, write_report
from fedfuse.report.plots import save_figure


def _put(folder: Path, name: str, content: Payload) -> None:
    (folder / "pictures").mkdir(exist_ok=True)
    (folder / "pictures" / f"{name}.safetensors").write_bytes(content.encode())


def test_lines_are_named_and_images_lie_side_by_side(tmp_path: Path) -> None:
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1) * 40
    figure = plots.drawing_sheet(images, ["cat", "a very long name of a class"], "FedAvg")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "a very long nam…"]
    assert axes.get_title(loc="left") == "FedAvg"
    # White lines part the images.
    shown: Any = axes.images[0].get_array()
    assert shown.tolist() == [[0, 255, 40, 255, 80], [255] * 5, [120, 255, 160, 255, 200]]
    save_figure(figure, tmp_path, "sheet")


def test_sheets_that_do_not_add_up_are_empty() -> None:
    for images, lines in ((np.zeros((5, 1, 2, 2), np.uint8), ["a", "b"]), (np.zeros((4, 2, 2, 2), np.uint8), ["a"])):
        assert not plots.drawing_sheet(images, lines).axes


def test_a_page_with_drawings_and_broken_files(run_folder: Path) -> None:
    images = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    _put(run_folder, "drawings", Payload({"images": images, "lines": json.dumps(["cat", "<b>dog</b>"])}))
    _put(run_folder, "no-json", Payload({"images": images, "lines": "[cat"}))
    _put(run_folder, "no-text", Payload({"images": images, "lines": 3}))
    _put(run_folder, "no-images", Payload({"lines": "[]"}))
    (run_folder / "pictures" / "torn.safetensors").write_bytes(b"torn")
    page = write_report(run_folder).read_text()
    assert page.count(">What the model draws</h2>") == 1
    assert "a line for each class: cat, &lt;b&gt;dog&lt;/b&gt;." in page
    assert "What the method made" not in page
