"""Labels beside points that cover neither each other nor the points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedfuse.report.plots.style import QUIET

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Box = tuple[float, float, float, float]
Point = tuple[float, float]
# Near before far, right before left: where a reader looks for a label first.
_ANGLES_DEG = (0, 180, 90, -90, 35, -35, 145, -145, 65, -65, 115, -115)
_NUMBER_PX = (16.0, 11.5)
_NUMBER_GAP_PX = 15.0
_RADII_PX = (11.0, 19.0, 30.0, 44.0, 62.0, 84.0, 110.0)


def place_labels(
    axes: Axes,
    points: Sequence[Point],
    texts: Sequence[str],
    colours: Sequence[str],
    strokes: Sequence[tuple[Point, Point]] = (),
) -> list[Box]:
    """Write a label beside each point; one that had to move away gets a thin line to its point.

    Args:
        axes: where; its limits must be set.
        points: in data coordinates.
        texts: one per point.
        colours: one per point.
        strokes: upright or level lines that labels should keep off, from point to point in data coordinates.

    Returns:
        Where the labels stand: left, bottom, right, top in pixels. They are free of overlaps as far as there is room.
    """
    figure = axes.get_figure(root=True)
    if figure is None or not points:
        return []
    figure.draw_without_rendering()
    # The layout is fixed from here on: labels that it made room for would move the points again.
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    frame = axes.get_window_extent(renderer)
    places = [(float(x), float(y)) for x, y in axes.transData.transform(list(points))]
    taken: list[Box] = [(x - 7, y - 7, x + 7, y + 7) for x, y in places]
    lines: list[Box] = []
    for stroke in strokes:
        (x0, y0), (x1, y1) = axes.transData.transform(list(stroke))
        lines.append((min(x0, x1) - 2, min(y0, y1) - 2, max(x0, x1) + 2, max(y0, y1) + 2))
    boxes: list[Box] = [(0.0, 0.0, 0.0, 0.0)] * len(points)
    # From the top down: the eye reads the best methods first, so they get the best places.
    for index in sorted(range(len(points)), key=lambda i: (-places[i][1], places[i][0])):
        x, y = places[index]
        text = axes.text(0, 0, texts[index], fontsize=9.5)
        extent = text.get_window_extent(renderer)
        text.remove()
        width, height = extent.width + 2, extent.height + 2
        options = [_beside(x, y, width, height, angle, radius) for radius in _RADII_PX for angle in _ANGLES_DEG]
        inside = [box for box in options if _within(box, (frame.x0, frame.y0, frame.x1, frame.y1))] or options
        box = min(inside, key=lambda option: _cost(option, taken, lines, (x, y)))
        taken.append(box)
        boxes[index] = box
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        edge = (min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))
        if math.dist(edge, (x, y)) > 16:
            (x0, y0), (x1, y1) = axes.transData.inverted().transform([(x, y), edge])
            axes.plot([x0, x1], [y0, y1], color=QUIET, linewidth=0.8, zorder=1)
        at_x, at_y = axes.transData.inverted().transform(middle)
        axes.text(at_x, at_y, texts[index], color=colours[index], fontsize=9.5, ha="center", va="center", zorder=5)
    return boxes


def place_numbers(axes: Axes, points: Sequence[Point], colours: Sequence[str]) -> list[Box]:
    """Number points 1, 2, 3 ...: the numbers stand in columns beside each group of points, with thin lines to them.

    Many methods cost the same, so their points stand above each other and there is no room for names.

    Args:
        axes: where; its limits must be set.
        points: in data coordinates.
        colours: one per point.

    Returns:
        Where the numbers stand: left, bottom, right, top in pixels, free of overlaps within a column.
    """
    figure = axes.get_figure(root=True)
    if figure is None or not points:
        return []
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    frame = axes.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]
    places = [(float(x), float(y)) for x, y in axes.transData.transform(list(points))]
    boxes: list[Box] = [(0.0, 0.0, 0.0, 0.0)] * len(points)
    for group in _groups(places):
        left, right = min(places[i][0] for i in group), max(places[i][0] for i in group)
        sides: dict[bool, list[int]] = {True: [], False: []}
        for rank, index in enumerate(sorted(group, key=lambda i: -places[i][1])):
            if right - left < 3:
                to_right = rank % 2 == 1
            else:
                to_right = places[index][0] - left > right - places[index][0]
            sides[to_right].append(index)
        for to_right, column in sides.items():
            heights = spread_out([places[i][1] for i in column], _NUMBER_PX[1], frame.y0 + 6, frame.y1 - 6)
            at_x = right + _NUMBER_GAP_PX if to_right else left - _NUMBER_GAP_PX
            at_x = min(max(at_x, frame.x0 + 10), frame.x1 - 10)
            for index, at_y in zip(column, heights, strict=True):
                (x, y), (text_x, text_y) = axes.transData.inverted().transform([places[index], (at_x, at_y)])
                axes.plot([x, text_x], [y, text_y], color=QUIET, linewidth=0.7, zorder=1)
                axes.text(
                    text_x,
                    text_y,
                    str(index + 1),
                    color=colours[index],
                    fontsize=8.6,
                    ha="left" if to_right else "right",
                    va="center_baseline",
                    zorder=5,
                )
                start = at_x if to_right else at_x - _NUMBER_PX[0]
                boxes[index] = (start, at_y - _NUMBER_PX[1] / 2, start + _NUMBER_PX[0], at_y + _NUMBER_PX[1] / 2)
    return boxes


def spread_out(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move heights apart as little as needed.

    Args:
        heights: falling.
        gap: least distance of two neighbours.
        low: least height; given up where there is no room.
        high: greatest height.

    Returns:
        Falling heights.

    Example:
        >>> spread_out([10.0, 9.0], 3.0, 0.0, 20.0)
        [11.0, 8.0]
    """
    # Neighbours that touch move as one, about their common middle.
    blocks: list[list[float]] = []
    for height in heights:
        blocks.append([height, 1.0])
        while len(blocks) > 1 and blocks[-2][0] - blocks[-1][0] < gap * (blocks[-2][1] + blocks[-1][1]) / 2:
            middle, count = blocks.pop()
            above = blocks[-1]
            blocks[-1] = [(above[0] * above[1] + middle * count) / (above[1] + count), above[1] + count]
    found = [middle + gap * ((count - 1) / 2 - k) for middle, count in blocks for k in range(int(count))]
    for index in range(len(found)):
        found[index] = min(found[index], high if index == 0 else found[index - 1] - gap)
    for index in reversed(range(len(found))):
        found[index] = max(found[index], low if index == len(found) - 1 else found[index + 1] + gap)
    return found


def _groups(places: Sequence[Point]) -> list[list[int]]:
    """Points that stand so near each other that their numbers could meet, directly or through others."""
    reach = (2 * _NUMBER_GAP_PX + _NUMBER_PX[0], 2 * _NUMBER_PX[1])
    groups: list[list[int]] = []
    for index, (x, y) in enumerate(places):
        near = [
            group
            for group in groups
            if any(abs(places[i][0] - x) < reach[0] and abs(places[i][1] - y) < reach[1] for i in group)
        ]
        groups = [*(group for group in groups if group not in near), [*(i for group in near for i in group), index]]
    return groups


def overlap(first: Box, second: Box) -> float:
    """Area that two boxes share.

    Args:
        first: left, bottom, right, top.
        second: left, bottom, right, top.

    Example:
        >>> overlap((0, 0, 2, 2), (1, 1, 3, 3))
        1
    """
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(width, 0) * max(height, 0)


def _beside(x: float, y: float, width: float, height: float, angle_deg: float, radius: float) -> Box:
    """A box that touches a circle about a point from outside, in a direction."""
    across, up = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
    centre_x = x + across * (radius + width / 2)
    centre_y = y + up * (radius + height / 2)
    return (centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2)


def _within(box: Box, frame: Box) -> bool:
    return box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]


def _cost(box: Box, taken: Sequence[Box], lines: Sequence[Box], point: Point) -> float:
    """What is wrong with a place: above all letters on letters, then letters on lines, then being far away."""
    far = math.dist(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), point)
    covered = sum(overlap(box, other) for other in taken)
    struck = sum(overlap(box, line) for line in lines)
    return 1000 * covered + 3 * struck + far
