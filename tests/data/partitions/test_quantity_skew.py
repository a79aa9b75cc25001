from __future__ import annotations

import numpy as np
import pytest

from fedfuse.core.errors import DataError
from fedfuse.data.partitions.quantity_skew import QuantitySkew

LABELS = np.zeros(1000, dtype=np.int64)


def _sizes(dirichlet_alpha: float) -> list[int]:
    partition = QuantitySkew(num_clients=5, dirichlet_alpha=dirichlet_alpha)
    return [len(p) for p in partition.assign(LABELS, 1, np.random.default_rng(0), {}).values()]


def test_sizes_go_from_even_to_one_takes_all() -> None:
    assert max(_sizes(1e7)) - min(_sizes(1e7)) <= 2
    assert sorted(_sizes(1e-6)) == [10, 10, 10, 10, 960]


def test_too_few_examples() -> None:
    with pytest.raises(DataError, match="49 examples cannot give 5 clients at least 10 each"):
        QuantitySkew(num_clients=5).assign(LABELS[:49], 1, np.random.default_rng(0), {})
