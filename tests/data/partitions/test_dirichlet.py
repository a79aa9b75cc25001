from __future__ import annotations

import time

import numpy as np
import pytest

from fedfuse.core.errors import DataError
from fedfuse.data.partitions.dirichlet import Dirichlet, dirichlet_counts

LABELS = np.arange(2000) % 10


def _counts(partition: Dirichlet, seed: int = 0) -> np.ndarray:
    found = partition.assign(LABELS, 10, np.random.default_rng(seed), {})
    return np.stack([np.bincount(LABELS[p], minlength=10) for p in found.values()])


class FixedDraws:
    """Stands in for a generator whose Dirichlet draws are known."""

    def __init__(self, *draws: list[float]) -> None:
        self.draws = list(draws)

    def dirichlet(self, concentration: np.ndarray) -> np.ndarray:
        return np.array(self.draws.pop(0))


def test_counts_by_hand() -> None:
    draws = [[0.5, 0.25, 0.25], [0.6, 0.1, 0.3]]
    plain = dirichlet_counts(np.array([8, 10]), 3, 1.0, FixedDraws(*draws), balanced=False)  # type: ignore[arg-type]
    assert plain.tolist() == [[4, 6], [2, 1], [2, 3]]
    # 18 / 3 = 6: after the first class the first client has 6 and gets none of the second: 0.1 and 0.3 become 1/4, 3/4.
    draws = [[0.75, 0.125, 0.125], [0.6, 0.1, 0.3]]
    balanced = dirichlet_counts(np.array([8, 10]), 3, 1.0, FixedDraws(*draws), balanced=True)  # type: ignore[arg-type]
    assert balanced.tolist() == [[6, 0], [1, 2], [1, 8]]


def test_a_draw_for_full_clients_only_goes_to_those_with_room() -> None:
    draws = [[1.0, 0.0], [1.0, 0.0]]
    counts = dirichlet_counts(np.array([4, 4]), 2, 1e-3, FixedDraws(*draws), balanced=True)  # type: ignore[arg-type]
    assert counts.tolist() == [[4, 0], [0, 4]]


def test_concentration_sets_the_skew() -> None:
    even = _counts(Dirichlet(num_clients=4, dirichlet_alpha=1e5, balanced=False))
    assert np.abs(even - 50).max() <= 5
    skewed = _counts(Dirichlet(num_clients=4, dirichlet_alpha=0.05))
    assert (skewed == 0).mean() > 0.4


def test_balanced_sizes_are_less_skewed() -> None:
    def spread(balanced: bool) -> float:
        partition = Dirichlet(num_clients=5, dirichlet_alpha=0.3, min_examples=1, balanced=balanced)
        return float(np.mean([_counts(partition, seed).sum(axis=1).std() for seed in range(20)]))

    assert spread(True) < 0.7 * spread(False)


def test_it_ends_soon_where_no_draw_will_do() -> None:
    partition = Dirichlet(num_clients=100, dirichlet_alpha=0.01, min_examples=20, balanced=False)
    start = time.perf_counter()
    with pytest.raises(DataError) as error:
        partition.assign(LABELS, 10, np.random.default_rng(0), {})
    assert time.perf_counter() - start < 10
    assert str(error.value) == (
        "1000 draws gave no partition in which each of 100 clients has 20 examples\n  where: partition\n"
        "  fix:   raise dirichlet_alpha, lower min_examples, use fewer clients, or more data"
    )


def test_too_few_examples_are_seen_before_any_draw() -> None:
    with pytest.raises(DataError, match="2000 examples cannot give 201 clients at least 10 each"):
        Dirichlet(num_clients=201).assign(LABELS, 10, np.random.default_rng(0), {})
