from __future__ import annotations

import numpy as np
import pytest

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.data.tables import find_label, table_features


def test_numbers_stay_and_categories_become_one_hot() -> None:
    train = {"a": np.array([1, 2]), "c": np.array(["y", "x"]), "e": np.array([[0.5, 1.5], [2.5, 3.5]])}
    test = {"a": np.array([3]), "c": np.array(["z"]), "e": np.array([[4.5, 5.5]])}
    x, x_test = table_features(train, test, ["a", "c", "e"], max_categories=4, where="t")
    assert x.tolist() == [[1, 0, 1, 0.5, 1.5], [2, 1, 0, 2.5, 3.5]]
    assert x_test is not None
    assert x_test.tolist() == [[3, 0, 0, 4.5, 5.5]]


def test_what_is_no_feature_is_refused() -> None:
    with pytest.raises(DataError) as error:
        table_features({"t": np.array(["a", "b", "c"])}, None, ["t"], max_categories=2, where="t")
    assert error.value.what == 'the column "t" holds texts (3 different ones, more than max_categories=2)'
    assert error.value.fix.startswith("this source reads images and numbers")
    with pytest.raises(DataError, match='the column "n" has no finite number in row 1'):
        table_features({"n": np.array([1.0, np.nan])}, None, ["n"], max_categories=2, where="t")
    with pytest.raises(DataError, match="there is no column of numbers to learn from"):
        table_features({}, None, [], max_categories=2, where="t")
    with pytest.raises(DataError, match='the column "n" holds numbers in one part and texts in the other'):
        table_features({"n": np.array([1.0])}, {"n": np.array(["a"])}, ["n"], max_categories=2, where="t")


def test_the_label_column_is_found_or_named() -> None:
    assert find_label(["x", "target", "label"], None, where="t") == "label"
    with pytest.raises(ConfigError) as error:
        find_label(["x", "species"], "specie", where="t")
    assert str(error.value) == (
        'label_column: there is no column "specie"\n  where: t\n  fix:   did you mean "species"? known: species, x'
    )
    with pytest.raises(ConfigError) as error:
        find_label(["x", "species"], None, where="t")
    assert error.value.fix == "set label_column to one of: x, species"
