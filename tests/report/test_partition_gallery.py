"""Several partitions side by side."""

from __future__ import annotations

import numpy as np
import pytest

from fedfuse.core.errors import ConfigError
from fedfuse.report import partition_gallery


def test_one_panel_a_scheme_and_one_bubble_a_holding() -> None:
    figure = partition_gallery(
        {"iid": np.full((3, 4), 5), "one class each": 20 * np.eye(3, 4), "many": np.ones((90, 4))}
    )
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["iid", "one class each", "many"]
    assert [len(axes.collections[0].get_offsets()) for axes in figure.axes[:2]] == [12, 3]
    assert len(figure.axes[2].images) == 1


def test_an_empty_gallery_is_an_error() -> None:
    with pytest.raises(ConfigError) as caught:
        partition_gallery({})
    assert str(caught.value) == (
        "there is no partition to draw\n  where: partition_gallery\n  fix:   give at least one table of counts"
    )


@pytest.mark.parametrize("table", [np.ones(3), np.ones((0, 2)), np.array([[-1.0]]), np.array([[np.nan]])])
def test_what_is_no_table_of_counts_is_an_error(table: np.ndarray) -> None:
    with pytest.raises(ConfigError) as caught:
        partition_gallery({"mine": table})
    assert str(caught.value) == (
        f"not a table of counts by client and class: shape {table.shape}\n"
        '  where: partition_gallery, "mine"\n'
        "  fix:   give finite counts of at least 0, shape (num_clients, num_classes)"
    )
