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
    with pytest.raises(DataError) as error:
        from_clients([(X, torch.tensor([0, 1]))], class_names=["only"])
    assert str(error.value) == (
        'the label "1" is none of the 1 classes: only\n'
        "  where: client_0\n"
        "  fix:   name its class in labels={own name: common name}, or add it to class_names"
    )
    images = [(torch.zeros(2, 1, side, side), torch.tensor([0, 1])) for side in (8, 12)]
    with pytest.raises(DataError) as error:
        from_clients(images)
    assert str(error.value) == (
        "inputs have shape (1, 12, 12) here and (1, 8, 8) at client_0\n"
        "  where: client_1\n"
        "  fix:   bring the inputs of all clients to one shape; resize=28 brings all images to 28 x 28 pixels"
    )
    data = from_clients(images, resize=8)
    assert [tuple(part.train.x.shape) for part in data.clients.values()] == [(2, 1, 8, 8)] * 2


def test_clients_with_label_sets_of_their_own_are_mapped_to_the_common_list() -> None:
    y = np.array(["benign", "malignant"])
    data = from_clients(
        {"a": (X, torch.tensor([1, 0])), "b": (X, y), "c": (X, torch.tensor([7, 9]))},
        test=[(X[0], "malignant"), (X[1], "healthy")],
        class_names=["benign", "malignant"],
        labels={"healthy": "benign", "c": {"7": "malignant", "9": "benign"}},
        validation_fraction=0,
    )
    assert [part.train.y.tolist() for part in data.clients.values()] == [[1, 0], [0, 1], [1, 0]]
    assert data.test is not None
    assert data.test.y.tolist() == [1, 0]
    assert (data.class_names, data.num_classes) == (("benign", "malignant"), 2)


def test_label_sets_that_cannot_be_mapped() -> None:
    two = {"a": (X, torch.tensor([0, 1])), "b": (X, np.array(["cat", "lynx"]))}
    with pytest.raises(DataError) as error:
        from_clients(two)
    assert str(error.value) == (
        "the labels are not numbers\n  where: b\n"
        "  fix:   number the classes 0 .. num_classes - 1, or give class_names for labels that are texts"
    )
    with pytest.raises(DataError) as error:
        from_clients(two, class_names=["cat", "dog"])
    assert str(error.value) == (
        'the label "lynx" is none of the 2 classes: cat, dog\n  where: b\n'
        "  fix:   name its class in labels={own name: common name}, or add it to class_names"
    )
    with pytest.raises(ConfigError) as caught:
        from_clients(two, class_names=["cat", "dog"], labels={"lynx": "cta"})
    assert str(caught.value) == (
        '"lynx" is mapped to "cta", which is none of the classes\n  where: labels.lynx\n'
        '  fix:   did you mean "cat"? known: cat, dog'
    )
    with pytest.raises(ConfigError) as caught:
        from_clients(two, class_names=["cat", "dog"], labels={"bb": {"lynx": "cat"}})
    assert str(caught.value) == (
        'there is no client "bb"\n  where: data.labels.bb\n  fix:   did you mean "b"? known: a, b'
    )
    with pytest.raises(ConfigError) as caught:
        from_clients(two, labels={"lynx": "cat"})
    assert str(caught.value) == (
        "labels are mapped to the common list of classes, and there is none\n  where: labels\n"
        '  fix:   give class_names=["cat", "dog"]'
    )


def test_classes_of_a_data_set_are_merged_for_all_and_told_apart_by_client() -> None:
    merged = federate(_dataset(), Iid(num_clients=2), seed=0, labels={"c": "a", "d": "b"})
    assert merged.class_names == ("a", "b")
    assert merged.label_counts().sum(axis=0).tolist() == [20, 20]
    # Column "site" says who is who; at site 1 what is called "a" is the others' "b", and the other way round.
    sites = np.array([0, 1] * 20)
    source = _dataset()
    source = Dataset(source.train, source.test, source.class_names, {"site": sites})
    plain = federate(source, Column(column="site"), seed=0, validation_fraction=0)
    crossed = federate(source, Column(column="site"), seed=0, validation_fraction=0, labels={"1": {"b": "d", "d": "b"}})
    assert plain.label_counts().tolist() == [[10, 0, 10, 0], [0, 10, 0, 10]]
    assert crossed.class_names == ("a", "b", "c", "d")
    for left, right in zip(plain.clients["1"].train.y.tolist(), crossed.clients["1"].train.y.tolist(), strict=True):
        assert (left, right) in {(1, 3), (3, 1)}
    with pytest.raises(ConfigError) as caught:
        federate(_dataset(), Iid(num_clients=2), seed=0, labels={"e": "a"})
    assert str(caught.value).startswith('there is no class "e"\n  where: data.labels.e\n')


def test_a_name_that_every_client_gives_up_is_no_class() -> None:
    source = Dataset(_dataset().train, None, tuple("abcd"), {"site": np.array([0, 1] * 20)})
    data = federate(source, Column(column="site"), seed=0, labels={"1": {"b": "a", "d": "c"}})
    assert data.class_names == ("a", "c")
    assert data.label_counts().sum(axis=0).tolist() == [20, 20]
