"""Every partition that needs no other package: what all of them promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse.core.errors import DataError
from fedfuse.core.registry import PARTITIONS
from fedfuse.core.settings import from_json
from fedfuse.data.partitions.assignment import client_ids


@st.composite
def _problems(draw: st.DrawFn) -> tuple[str, dict[str, Any], np.ndarray, int, int]:
    name = draw(st.sampled_from(["iid", "dirichlet", "shards", "quantity_skew", "column", "long_tail"]))
    num_classes = draw(st.integers(1, 6))
    labels = np.array(draw(st.lists(st.integers(0, num_classes - 1), min_size=1, max_size=200)), dtype=np.int64)
    num_clients = draw(st.integers(1, 12))
    alpha = draw(st.floats(1e-3, 100))
    least = draw(st.integers(1, 5))
    values: dict[str, dict[str, Any]] = {
        "iid": {"num_clients": num_clients, "stratify": draw(st.booleans())},
        "dirichlet": {
            "num_clients": num_clients,
            "dirichlet_alpha": alpha,
            "min_examples": least,
            "balanced": draw(st.booleans()),
            "max_draws": 20,
        },
        "shards": {"num_clients": num_clients, "num_shards_per_client": draw(st.integers(1, 4))},
        "quantity_skew": {"num_clients": num_clients, "dirichlet_alpha": alpha, "min_examples": least},
        "column": {"column": "site"},
        "long_tail": {
            "num_clients": num_clients,
            "imbalance_factor": draw(st.floats(1, 200)),
            "split": draw(st.sampled_from(["iid", "dirichlet"])),
            "dirichlet_alpha": 1.0,
            "min_examples": least,
        },
    }
    return name, values[name], labels, num_classes, draw(st.integers(0, 2**40))


@settings(max_examples=150, deadline=None)
@given(_problems())
def test_disjoint_whole_deterministic_and_not_too_small(
    problem: tuple[str, dict[str, Any], np.ndarray, int, int],
) -> None:
    name, values, labels, num_classes, seed = problem
    partition = from_json(PARTITIONS.get(name), values, where="partition")
    columns = {"site": labels % 3}
    try:
        found = partition.assign(labels, num_classes, np.random.default_rng(seed), columns)
    except DataError as error:
        # A refusal is an answer too, if it says where and what to do.
        refusal = error
        found = {}
    if not found:
        assert (refusal.where, bool(refusal.fix)) == ("partition", True)
        return
    again = partition.assign(labels, num_classes, np.random.default_rng(seed), columns)
    assert list(found) == sorted(found) == list(again)
    assert all(np.array_equal(found[client], again[client]) for client in found)
    for positions in found.values():
        assert positions.dtype == np.int64
        assert np.all(np.diff(positions) > 0)
        # Clients of the iid split inside long_tail need only one example.
        is_iid = values.get("split") == "iid"
        assert len(positions) >= (1 if is_iid else values.get("min_examples", 1))
    everything = np.sort(np.concatenate(list(found.values())))
    if name == "long_tail":
        assert len(np.unique(everything)) == len(everything) <= len(labels)
    else:
        assert everything.tolist() == list(range(len(labels)))
    if "num_clients" in values:
        assert list(found) == client_ids(values["num_clients"])


def test_ids_sort_as_numbers() -> None:
    assert client_ids(10) == [f"client_{k}" for k in range(10)]
    assert client_ids(1) == ["client_0"]
    assert client_ids(101) == sorted(client_ids(101))
    assert client_ids(101)[7] == "client_007"


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("iid", {"num_clients": 0}, "num_clients must be at least 1, not 0"),
        ("dirichlet", {"num_clients": 2, "dirichlet_alpha": 0}, "dirichlet_alpha must be above 0, not 0.0"),
        ("dirichlet", {"num_clients": 2, "min_examples": 0}, "min_examples must be at least 1, not 0"),
        ("shards", {"num_clients": 2, "num_shards_per_client": 0}, "num_shards_per_client must be at least 1, not 0"),
        ("long_tail", {"num_clients": 2, "imbalance_factor": 0.5}, "imbalance_factor must be at least 1, not 0.5"),
        ("column", {"column": "a", "max_clients": 0}, "max_clients must be at least 1, not 0"),
        ("dirichlet", {"num_clients": 2, "alpha": 1}, 'unknown setting "alpha"'),
        ("iid", {}, 'the setting "num_clients" is missing'),
    ],
)
def test_settings_are_checked(name: str, values: dict[str, Any], message: str) -> None:
    from fedfuse.core.errors import ConfigError

    with pytest.raises(ConfigError) as error:
        from_json(PARTITIONS.get(name), values, where="partition")
    assert error.value.what == message
