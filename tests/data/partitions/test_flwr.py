from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.data.partitions.flwr import Flwr

LABELS = np.arange(60) % 3


class EveryOtherPartitioner:
    """Has the interface of flwr-datasets: takes a data set, gives parts of it."""

    def __init__(self, num_partitions: int, partition_by: str, seed: int = 42) -> None:
        if num_partitions < 1:
            raise ValueError("The number of partitions must be greater than zero.")
        self.num_partitions, self.partition_by, self.seed = num_partitions, partition_by, seed
        self.dataset: Any = None

    def load_partition(self, partition_id: int) -> Any:
        if self.num_partitions > 60:
            raise RuntimeError("too many\nsecond line")
        assert self.partition_by == "label"
        assert self.seed != 42
        return self.dataset.select(range(partition_id, len(self.dataset), self.num_partitions))


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    module = types.ModuleType("flwr_datasets.partitioner")
    module.EveryOtherPartitioner = EveryOtherPartitioner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flwr_datasets", types.ModuleType("flwr_datasets"))
    monkeypatch.setitem(sys.modules, "flwr_datasets.partitioner", module)


def _assign(name: str, **settings: Any) -> dict[str, np.ndarray]:
    partition = Flwr(partitioner=name, settings=settings)
    return partition.assign(LABELS, 3, np.random.default_rng(0), {"site": np.array(["a"] * 60)})


@pytest.mark.usefixtures("double")
def test_parts_become_clients() -> None:
    found = _assign("EveryOtherPartitioner", num_partitions=2)
    assert {name: p.tolist() for name, p in found.items()} == {
        "client_0": list(range(0, 60, 2)),
        "client_1": list(range(1, 60, 2)),
    }


@pytest.mark.usefixtures("double")
def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError) as error:
        _assign("EveryOtherPartition")
    assert error.value.fix == 'did you mean "EveryOtherPartitioner"? known: EveryOtherPartitioner'
    with pytest.raises(ConfigError, match='EveryOtherPartitioner has no setting "alpha"'):
        _assign("EveryOtherPartitioner", num_partitions=2, alpha=1)
    with pytest.raises(ConfigError, match="EveryOtherPartitioner refuses its settings: ValueError: The number"):
        _assign("EveryOtherPartitioner", num_partitions=0)
    with pytest.raises(DataError) as failed:
        _assign("EveryOtherPartitioner", num_partitions=61)
    assert failed.value.what == "EveryOtherPartitioner failed: RuntimeError: too many"


def test_absence_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    monkeypatch.setitem(sys.modules, "flwr_datasets.partitioner", None)
    with pytest.raises(DataError) as error:
        _assign("IidPartitioner", num_partitions=2)
    assert error.value.fix == 'pip install "fedfuse[partitions]"'


def test_the_real_package() -> None:
    pytest.importorskip("flwr_datasets", reason="flwr-datasets is not installed")
    found = _assign("DirichletPartitioner", num_partitions=3, alpha=1.0, min_partition_size=2)
    assert sorted(np.concatenate(list(found.values())).tolist()) == list(range(60))
