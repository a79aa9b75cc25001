from __future__ import annotations

import numpy as np

from fedfuse.data.partitions.long_tail import LongTail, long_tail_sizes


def test_sizes_by_hand() -> None:
    assert long_tail_sizes(np.array([1000] * 4), 1000.0).tolist() == [1000, 100, 10, 1]
    assert long_tail_sizes(np.array([7, 9]), 1.0).tolist() == [7, 9]
    assert long_tail_sizes(np.array([5]), 50.0).tolist() == [5]
    assert long_tail_sizes(np.array([100, 0, 3]), 10.0).tolist() == [100, 0, 3]


def test_the_clients_together_have_the_tail() -> None:
    labels = np.arange(3000) % 3
    for split in ("iid", "dirichlet"):
        partition = LongTail(num_clients=4, imbalance_factor=100, split=split)  # type: ignore[arg-type]
        found = partition.assign(labels, 3, np.random.default_rng(0), {})
        kept = np.concatenate(list(found.values()))
        assert np.bincount(labels[kept]).tolist() == [1000, 100, 10]
        assert len(found) == 4
