"""Clients that leave, and clients that come late."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.examples import Examples
from fedfuse.data.dataset import Dataset
from fedfuse.data.federate import FederatedData, from_clients
from fedfuse.data.membership import with_late_client, without_clients

NAMES = ("cat", "dog", "owl")


def federation() -> FederatedData:
    x, y = torch.arange(24.0).reshape(12, 2), torch.arange(12) % 3
    clients = {"a": (x[:6], y[:6]), "b": (x[6:], y[6:])}
    return from_clients(clients, class_names=NAMES, validation_fraction=0.0, normalize={"mean": [1, 1], "std": [2, 2]})


def late(names: tuple[str, ...], y: list[int], width: int = 2) -> Dataset:
    return Dataset(Examples(torch.ones(len(y), width), torch.tensor(y)), None, names)


def join(data: FederatedData, dataset: Dataset, client_id: str = "ab", **settings: object) -> FederatedData:
    return with_late_client(data, client_id, dataset, seed=0, validation_fraction=0.0, **settings)  # type: ignore[arg-type]


def test_who_leaves_takes_nothing_of_the_others() -> None:
    data = federation()
    rest = without_clients(data, ["a"])
    assert list(rest.clients) == ["b"]
    assert rest.clients["b"].fingerprint == data.clients["b"].fingerprint
    assert list(data.clients) == ["a", "b"]


def test_nobody_unknown_leaves_and_somebody_stays() -> None:
    with pytest.raises(ConfigError) as caught:
        without_clients(federation(), ["c"])
    assert str(caught.value) == 'there is no client "c"\n  where: data.without\n  fix:   known: a, b'
    with pytest.raises(ConfigError) as caught:
        without_clients(federation(), ["a", "b"])
    assert str(caught.value) == "no client is left\n  where: data.without\n  fix:   leave at least one"


def test_a_late_client_has_the_common_normalisation_and_order() -> None:
    data = join(federation(), late(("owl", "cat"), [0, 1, 1]))
    assert list(data.clients) == ["a", "ab", "b"]
    part = data.clients["ab"]
    assert part.train.y.tolist() == [2, 0, 0]
    assert part.train.x.tolist() == [[0.0, 0.0]] * 3
    assert part.num_classes == 3


@pytest.mark.parametrize("labels", [{"Katze": "cat"}, {"ab": {"Katze": "cat"}}])
def test_classes_are_found_by_number_or_by_the_table(labels: dict[str, object]) -> None:
    assert join(federation(), late(("1", "2"), [0, 1])).clients["ab"].train.y.tolist() == [1, 2]
    mapped = join(federation(), late(("Katze", "dog"), [0, 1]), labels=labels)
    assert mapped.clients["ab"].train.y.tolist() == [0, 1]


def test_the_validation_part_is_that_of_the_client_had_it_been_there() -> None:
    x, y = torch.randn(20, 2), torch.arange(20) % 2
    rest = (torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))
    whole = from_clients({"a": (x, y), "b": rest}, seed=3, validation_fraction=0.2, normalize="none")
    alone = from_clients({"b": rest}, seed=3, validation_fraction=0.2, normalize="none")
    dataset = Dataset(Examples(x, y), None, ("0", "1"))
    joined = with_late_client(alone, "a", dataset, seed=3, validation_fraction=0.2)
    assert joined.clients["a"].fingerprint == whole.clients["a"].fingerprint


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        join(federation(), late(("cat",), [0], width=3))
    assert str(caught.value) == (
        "inputs have shape (3,) here and (2,) at the other clients\n"
        "  where: data.late.ab\n"
        "  fix:   bring the inputs of all clients to one shape"
    )
    with pytest.raises(DataError) as caught:
        join(federation(), late(("cat", "cow"), [0, 1]))
    assert str(caught.value) == (
        'the label "cow" is none of the 3 classes: cat, dog, owl\n'
        "  where: data.late.ab\n"
        "  fix:   map it to a common class in data.labels"
    )
    with pytest.raises(ConfigError) as caught:
        join(federation(), late(("cat",), [0]), client_id="a")
    assert str(caught.value) == ('there is a client "a" already\n  where: data.late.a\n  fix:   give another name')
    assert np.array_equal(federation().label_counts(), [[2, 2, 2], [2, 2, 2]])
