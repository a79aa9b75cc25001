from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.examples import Examples
from fedfuse.data import Dataset, Normalization, federate, from_clients
from fedfuse.data.partitions import Column, Dirichlet, Iid
from fedfuse.data.sources.digits import Digits


def _dataset(n: int = 40) -> Dataset:
    """Feature 0 is the row, so that every example can be traced."""
    x = torch.stack([torch.arange(float(n)), torch.ones(n)], dim=1)
    return Dataset(Examples(x, torch.arange(n) % 4), Examples(x[:4], torch.arange(4)), tuple("abcd"))


def test_every_example_has_one_place() -> None:
    data = federate(_dataset(), Iid(num_clients=4), seed=0, validation_fraction=0.2, normalize="none")
    assert list(data.clients) == ["client_0", "client_1", "client_2", "client_3"]
    for client_id, client in data.clients.items():
        assert (len(client.train), len(client.validation), client.augment, client.num_classes) == (8, 2, "none", 4)
        rows = torch.cat([client.train.x[:, 0], client.validation.x[:, 0]]).sort().values
        assert rows.tolist() == data.positions[client_id].tolist()
    assert data.label_counts().shape == (4, 4)
    assert data.label_counts().sum(axis=0).tolist() == [10] * 4
    assert (data.class_names, data.input_shape, data.num_classes) == (("a", "b", "c", "d"), (2,), 4)
    assert data.test is not None
    assert torch.equal(data.test.x, _dataset().test.x)


def test_the_seed_decides_and_the_validation_fraction_does_not_move_clients() -> None:
    one, same, other = (federate(_dataset(), Iid(num_clients=4), seed=seed) for seed in (1, 1, 2))
    assert {c: d.fingerprint for c, d in one.clients.items()} == {c: d.fingerprint for c, d in same.clients.items()}
    assert one.positions["client_0"].tolist() != other.positions["client_0"].tolist()
    none = federate(_dataset(), Iid(num_clients=4), seed=1, validation_fraction=0)
    assert none.positions["client_0"].tolist() == one.positions["client_0"].tolist()
    assert len(none.clients["client_0"].validation) == 0


def test_one_example_is_for_training() -> None:
    data = federate(_dataset(4), Iid(num_clients=4), seed=0, validation_fraction=0.9)
    for client in data.clients.values():
        assert (len(client.train), len(client.validation)) == (1, 0)
        assert len(client.fingerprint) == 64


def test_all_parts_are_normalised_by_the_training_part() -> None:
    data = federate(_dataset().limited(2), Iid(num_clients=1), seed=0, validation_fraction=0)
    assert data.normalization == Normalization((0.5, 1.0), (0.5, 1.0))
    assert data.clients["client_0"].train.x.tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    assert data.test is not None
    assert data.test.x[:3].tolist() == [[-1.0, 0.0], [1.0, 0.0], [3.0, 0.0]]


def test_changed_inputs_stay_with_their_clients() -> None:
    first = federate(_dataset(), Dirichlet(num_clients=3, min_examples=2), seed=5)
    source = _dataset()
    changed = Dataset(Examples(source.train.x * 2, source.train.y), None, source.class_names)
    second = federate(changed, Dirichlet(num_clients=3, min_examples=2), seed=5)
    assert [p.tolist() for p in first.positions.values()] == [p.tolist() for p in second.positions.values()]


def test_real_digits() -> None:
    data = federate(Digits().load(), Dirichlet(num_clients=5, dirichlet_alpha=0.3), seed=0)
    assert data.input_shape == (1, 8, 8)
    assert data.label_counts().sum() == 1438
    with pytest.raises(ConfigError, match='the data has no column "site"'):
        federate(Digits().load(), Column(column="site"), seed=0)


class Faulty:
    def __init__(self, answer: dict[str, list[int]]) -> None:
        self.answer = answer

    def assign(
        self, labels: np.ndarray, num_classes: int, rng: np.random.Generator, columns: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        return {name: np.array(rows) for name, rows in self.answer.items()}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({}, "the partition made no clients"),
        ({"a": []}, "the partition gave a no examples"),
        ({"a": [40]}, "the partition gave a an example that does not exist"),
        ({"a": [-1]}, "the partition gave a an example that does not exist"),
        ({"b": [3], "a": [3]}, "the partition gave example 3 to a and to b"),
        ({"a": [3, 3]}, "the partition gave example 3 to a and to a"),
    ],
)
def test_a_faulty_partition_is_told(answer: dict[str, list[int]], message: str) -> None:
    with pytest.raises(DataError) as error:
        federate(_dataset(), Faulty(answer), seed=0)
    assert error.value.what == message


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="validation_fraction must be in \\[0, 1\\), not 1"):
        federate(_dataset(), Iid(num_clients=2), seed=0, validation_fraction=1)
    with pytest.raises(ConfigError, match='the augmentation "flip" is for images'):
        federate(_dataset(), Iid(num_clients=2), seed=0, augment="flip")
    with pytest.raises(ConfigError, match='there is no augmentation "x"'):
        federate(_dataset(), Iid(num_clients=2), seed=0, augment="x")


X = torch.tensor([[0.0], [2.0]])


def test_clients_that_are_already_split() -> None:
    data = from_clients(
        {"b": (X, torch.tensor([0, 2])), "a": TensorDataset(X, torch.tensor([1, 1]))}, test=(X, torch.tensor([0, 1]))
    )
    assert list(data.clients) == ["a", "b"]
    assert data.class_names == ("0", "1", "2")
    assert data.positions == {}
    assert data.normalization == Normalization((1.0,), (1.0,))
    assert data.test is not None
    assert data.label_counts().tolist() == [[0, 2, 0], [1, 0, 1]]
    listed = from_clients([(X, torch.tensor([0, 1]))] * 11, class_names=["no", "yes"])
    assert next(iter(listed.clients)) == "client_00"
    assert listed.class_names == ("no", "yes")
    assert listed.test is None


def test_clients_that_do_not_fit_together() -> None:
    with pytest.raises(DataError, match="there are no clients"):
        from_clients([])
    with pytest.raises(DataError) as error:
        from_clients({"a": (X, torch.tensor([0, 1])), "b": (torch.zeros(1, 2), torch.tensor([0]))})
    assert str(error.value) == (
        "inputs have shape (2,) here and (1,) at a\n  where: b\n  fix:   bring the inputs of all clients to one shape"
    )
    with pytest.raises(DataError) as error:
        from_clients({"a": []})
    assert (error.value.what, error.value.where) == ("the data set is empty", "a")
    with pytest.raises(DataError, match="the training labels go from 0 to 1, but there are 1 classes"):
        from_clients([(X, torch.tensor([0, 1]))], class_names=["only"])
