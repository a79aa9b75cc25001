from __future__ import annotations

import numpy as np
import pytest

from fedfuse.core.errors import DataError
from fedfuse.data.partitions.iid import Iid

LABELS = np.repeat([0, 1, 2], [6, 9, 5])


def test_sizes_differ_by_at_most_one() -> None:
    found = Iid(num_clients=3).assign(LABELS, 3, np.random.default_rng(0), {})
    assert [len(p) for p in found.values()] == [7, 7, 6]


def test_stratified_class_counts_differ_by_at_most_one() -> None:
    found = Iid(num_clients=3, stratify=True).assign(LABELS, 3, np.random.default_rng(0), {})
    counts = np.stack([np.bincount(LABELS[p], minlength=3) for p in found.values()])
    assert counts[:, 0].tolist() == [2, 2, 2]
    assert counts[:, 1].tolist() == [3, 3, 3]
    assert sorted(counts[:, 2].tolist()) == [1, 2, 2]


def test_too_few_examples() -> None:
    with pytest.raises(DataError) as error:
        Iid(num_clients=3).assign(np.array([0, 1]), 2, np.random.default_rng(0), {})
    assert str(error.value) == (
        "2 examples cannot give 3 clients at least 1 each\n  where: partition\n"
        "  fix:   use at most 2 clients, a smaller minimum, or more data"
    )
