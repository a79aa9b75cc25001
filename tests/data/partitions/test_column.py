from __future__ import annotations

import numpy as np
import pytest

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.data.partitions.column import Column, value_ids

LABELS = np.zeros(6, dtype=np.int64)
SITES = {"site": np.array(["b", "a", "b", "c", "b", "a"])}
RNG = np.random.default_rng(0)


def test_one_client_per_value() -> None:
    found = Column(column="site").assign(LABELS, 1, RNG, SITES)
    assert {name: p.tolist() for name, p in found.items()} == {"a": [1, 5], "b": [0, 2, 4], "c": [3]}


def test_small_clients_and_the_smallest_are_left_out() -> None:
    assert list(Column(column="site", min_examples=2).assign(LABELS, 1, RNG, SITES)) == ["a", "b"]
    assert list(Column(column="site", max_clients=1).assign(LABELS, 1, RNG, SITES)) == ["b"]
    with pytest.raises(DataError) as error:
        Column(column="site", min_examples=4).assign(LABELS, 1, RNG, SITES)
    assert (error.value.what, error.value.fix) == (
        'no value of the column "site" has 4 examples',
        "set min_examples to 3 or less",
    )


def test_a_missing_column_names_the_nearest() -> None:
    with pytest.raises(ConfigError) as error:
        Column(column="sites").assign(LABELS, 1, RNG, SITES)
    assert str(error.value) == (
        'the data has no column "sites"\n  where: partition.column\n  fix:   did you mean "site"? known: site'
    )


def test_ids_are_safe_and_different() -> None:
    assert value_ids(np.array(["", "..", "A b", "a b", "a/b", "x" * 70])) == [
        "empty",
        "empty_2",
        "A_b",
        "a_b_2",
        "a_b_3",
        "x" * 64,
    ]
    assert value_ids(np.array([0, 5, 100])) == ["000", "005", "100"]
    assert value_ids(np.array([-1, 1])) == ["-1", "1"]
