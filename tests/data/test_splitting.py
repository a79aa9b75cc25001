from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedfuse.data.splitting import share_out, stratified_split


def test_every_class_keeps_its_share() -> None:
    labels = np.repeat([0, 1, 2], [10, 20, 30])
    kept, held = stratified_split(labels, 0.1, np.random.default_rng(0))
    assert np.bincount(labels[held]).tolist() == [1, 2, 3]
    assert len(kept) == 54


def test_one_example_stays() -> None:
    kept, held = stratified_split(np.array([4]), 0.9, np.random.default_rng(0))
    assert kept.tolist() == [0]
    assert held.tolist() == []


def test_largest_remainders_are_served_first() -> None:
    assert share_out(7, np.array([5, 3, 2])).tolist() == [4, 2, 1]  # 3.5, 2.1, 1.4
    assert share_out(0, np.array([1, 1])).tolist() == [0, 0]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.floats(0, 0.999), st.integers(0, 2**32))
def test_a_split_is_whole_and_deterministic(labels: list[int], fraction: float, seed: int) -> None:
    kept, held = stratified_split(np.array(labels), fraction, np.random.default_rng(seed))
    again, _ = stratified_split(np.array(labels), fraction, np.random.default_rng(seed))
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(len(labels)))
    assert len(kept) >= 1
    assert kept.tolist() == again.tolist()
    assert len(held) == min(int(len(labels) * fraction + 0.5), len(labels) - 1)


@given(st.integers(0, 10**6), st.lists(st.floats(0, 1e6), min_size=1, max_size=30).filter(lambda w: sum(w) > 1e-6))
def test_shares_sum_to_the_total(total: int, weights: list[float]) -> None:
    counts = share_out(total, np.array(weights))
    assert counts.sum() == total
    assert counts.min() >= 0
