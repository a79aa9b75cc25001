from __future__ import annotations

import numpy as np
import pytest

from fedfuse.core.errors import DataError
from fedfuse.data.labels import encode_labels


def test_classes_are_numbered_in_sorted_order_over_both_parts() -> None:
    y, y_test, names = encode_labels(np.array([30, 10]), np.array([20]), where="t")
    assert (y.tolist(), y_test.tolist() if y_test is not None else None, names) == ([2, 0], [1], ("10", "20", "30"))
    y, _, names = encode_labels(np.array([10.0, 9.0]), None, where="t")
    assert (y.tolist(), names) == ([1, 0], ("9", "10"))
    y, _, names = encode_labels(np.array([True, False]), None, where="t")
    assert (y.tolist(), names) == ([1, 0], ("0", "1"))


def test_named_classes_keep_their_numbers() -> None:
    y, _, names = encode_labels(np.array([2, 2]), None, ("a", "b", "c"), where="t")
    assert (y.tolist(), names) == ([2, 2], ("a", "b", "c"))


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (np.array([0, -1]), ("a", "b"), "row 1 has the label -1, but there are 2 classes"),
        (np.array([0.5]), None, "the labels are not classes: row 0 holds 0.5"),
        (np.array([1.0, np.nan]), None, "the labels are not classes: row 1 holds nan"),
        (np.array(["a", ""]), None, "row 1 has no label"),
        (np.array(["a", None], dtype=object), None, "row 1 has no label"),
        (np.zeros((2, 3)), None, "the labels have shape (2, 3)"),
        (np.array(["a"]), ("a",), "the labels are texts, but the data names 1 classes for numbers"),
        (np.array([b"a"], dtype=object), None, "the labels are not classes: one is a bytes"),
    ],
)
def test_what_is_no_class_is_refused(labels: np.ndarray, names: tuple[str, ...] | None, message: str) -> None:
    with pytest.raises(DataError) as error:
        encode_labels(labels, None, names, where="t")
    assert error.value.what == message
