from __future__ import annotations

import numpy as np
import pytest

from fedfuse.core.errors import DataError
from fedfuse.data.partitions.shards import Shards


def test_a_client_has_at_most_one_class_per_whole_shard() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 20))
    found = Shards(num_clients=10, num_shards_per_client=2).assign(labels, 10, np.random.default_rng(1), {})
    assert all(len(p) == 20 and len(np.unique(labels[p])) <= 2 for p in found.values())


def test_too_few_examples() -> None:
    with pytest.raises(DataError, match="5 examples cannot be cut into 6 shards"):
        Shards(num_clients=3).assign(np.zeros(5, dtype=np.int64), 1, np.random.default_rng(0), {})
