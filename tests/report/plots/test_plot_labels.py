"""Labels that cover neither each other nor the points."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedfuse.core.seeding import Rng
from fedfuse.report.plots.labels import overlap, place_labels
from fedfuse.report.plots.style import house_style, new_figure


@pytest.mark.parametrize("num_points", [1, 2, 8, 15])
def test_crowded_labels_do_not_overlap(num_points: int) -> None:
    points = Rng(0).numpy("points").normal(0.5, 0.02, (num_points, 2))
    with house_style():
        figure = new_figure(4.6)
        axes = figure.subplots()
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        boxes = place_labels(
            axes, [(x, y) for x, y in points], [f"method {k}" for k in range(num_points)], ["k"] * num_points
        )
        frame = axes.get_window_extent()
    assert all(overlap(a, b) == 0 for a, b in itertools.combinations(boxes, 2))
    assert all(frame.x0 <= box[0] and box[2] <= frame.x1 and frame.y0 <= box[1] and box[3] <= frame.y1 for box in boxes)


def test_labels_keep_off_points_and_lines() -> None:
    with house_style():
        figure = new_figure(4.6)
        axes = figure.subplots()
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        (box,) = place_labels(axes, [(0.5, 0.5)], ["a name"], ["k"], [((0.5, 0.5), (1.0, 0.5))])
        (_, y), (_, _) = axes.transData.transform([(0.5, 0.5), (1.0, 0.5)])
    assert not box[1] <= y <= box[3] or box[2] < np.asarray(axes.transData.transform((0.5, 0.5)))[0]


def test_no_points_no_labels() -> None:
    axes = new_figure(2).subplots()
    assert place_labels(axes, [], [], []) == []


def test_overlap_by_hand() -> None:
    assert overlap((0, 0, 4, 4), (1, 2, 3, 9)) == 4
    assert overlap((0, 0, 1, 1), (1, 0, 2, 1)) == 0
