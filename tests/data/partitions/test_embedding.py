"""Clusters of embeddings, and how they are split."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.examples import Examples
from fedfuse.core.registry import PARTITIONS
from fedfuse.core.settings import from_json
from fedfuse.data.dataset import Dataset
from fedfuse.data.federate import federate
from fedfuse.data.partitions import Dirichlet, Embedding
from fedfuse.data.partitions.embedding import CLUSTERS, cluster, token_topics


def blobs(n: int = 60) -> Tensor:
    """Two groups of points, far from each other, in turn."""
    x = 0.1 * torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    x[1::2] += 10
    return x


def dataset(x: Tensor, *, is_coded: bool = False) -> Dataset:
    y = torch.zeros(len(x), dtype=torch.int64)
    return Dataset(Examples(x, y), None, ("all",), is_coded=is_coded)


def texts() -> Tensor:
    """Texts of tokens 1 to 4, and texts of tokens 11 to 14, in turn, of two lengths."""
    rows = torch.tensor(
        [[1, 2, 3, 4], [11, 12, 13, 14], [2, 1, 4, -1], [12, 14, 11, -1], [3, 2, 1, 1], [14, 13, 12, 11]]
    )
    return rows.float()


def test_two_blobs_are_split_by_cluster_as_dirichlet_splits_classes() -> None:
    partition = Embedding(num_clients=3, dirichlet_alpha=0.2, min_examples=5, num_clusters=2)
    columns = partition.columns_of(dataset(blobs()))
    assert columns[CLUSTERS].tolist() == [0, 1] * 30
    found = partition.assign(np.zeros(60, np.int64), 1, np.random.default_rng(4), columns)
    plain = Dirichlet(num_clients=3, dirichlet_alpha=0.2, min_examples=5)
    wanted = plain.assign(columns[CLUSTERS], 2, np.random.default_rng(4), {})
    assert {c: rows.tolist() for c, rows in found.items()} == {c: rows.tolist() for c, rows in wanted.items()}


def test_a_tiny_concentration_gives_each_blob_to_one_client() -> None:
    partition = Embedding(num_clients=2, dirichlet_alpha=1e-4, num_clusters=2)
    data = federate(dataset(blobs()), partition, seed=3, validation_fraction=0.0, normalize="none")
    owners = {client_id: set((rows % 2).tolist()) for client_id, rows in data.positions.items()}
    assert sorted(map(len, owners.values())) == [1, 1]
    assert set.union(*owners.values()) == {0, 1}


def test_seeds_change_who_gets_what_but_not_the_clusters() -> None:
    partition = Embedding(num_clients=3, min_examples=2, num_clusters=4)
    whole = dataset(torch.randn(80, 5, generator=torch.Generator().manual_seed(1)))
    first, again = partition.columns_of(whole), partition.columns_of(whole)
    assert np.array_equal(first[CLUSTERS], again[CLUSTERS])
    one, same, other = (federate(whole, partition, seed=seed).positions for seed in (1, 1, 2))
    assert all(np.array_equal(one[client_id], same[client_id]) for client_id in one)
    assert any(not np.array_equal(one[client_id], other[client_id]) for client_id in one)
    assert np.sort(np.concatenate(list(one.values()))).tolist() == list(range(80))


def test_clusters_are_numbered_by_their_first_example() -> None:
    vectors = np.array([[9.0], [0.0], [9.1], [5.0], [0.1], [5.1]])
    assert cluster(vectors, 3).tolist() == [0, 1, 0, 2, 1, 2]


def test_texts_are_told_apart_by_their_tokens() -> None:
    topics = token_topics(texts())
    assert np.linalg.norm(topics, axis=1) == pytest.approx(1.0)
    assert topics[0] @ topics[1] == pytest.approx(0.0, abs=1e-12)
    partition = Embedding(num_clients=1, num_clusters=2)
    assert partition.columns_of(dataset(texts(), is_coded=True))[CLUSTERS].tolist() == [0, 1, 0, 1, 0, 1]


def test_the_flags_of_dialogues_are_not_looked_at() -> None:
    x = texts()
    flags = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(len(x), 1)
    assert np.allclose(token_topics(torch.cat([x, flags], 1)), token_topics(x))


def test_a_model_s_vectors_are_used_where_they_are_asked_for() -> None:
    partition = Embedding(num_clients=1, num_clusters=2, features="model")
    seen: list[Dataset] = []

    def embed(whole: Dataset) -> Tensor:
        seen.append(whole)
        return (torch.arange(len(whole.train)) >= 20).float()[:, None]

    whole = dataset(blobs(40))
    assert partition.columns_of(whole, embed)[CLUSTERS].tolist() == [0] * 20 + [1] * 20
    assert seen == [whole]
    data = federate(whole, partition, seed=0, embed=embed)
    assert list(data.positions) == ["client_0"]


@pytest.mark.parametrize(
    ("features", "is_coded", "message"),
    [
        (
            "inputs",
            True,
            (
                "the inputs are tokens, whose differences mean nothing\n"
                "  where: partition.features\n"
                "  fix:   use features: tokens, or model"
            ),
        ),
        (
            "tokens",
            False,
            "the inputs are no tokens\n  where: partition.features\n  fix:   use features: inputs, or model",
        ),
        (
            "model",
            False,
            (
                "there is no model to make embeddings\n"
                "  where: partition.features\n"
                "  fix:   use a configuration, or features: inputs or tokens"
            ),
        ),
    ],
)
def test_features_that_the_data_does_not_have(features: Any, is_coded: bool, message: str) -> None:
    partition = Embedding(num_clients=1, num_clusters=2, features=features)
    with pytest.raises(ConfigError) as caught:
        partition.columns_of(dataset(blobs(), is_coded=is_coded))
    assert str(caught.value) == message


def test_too_few_different_examples() -> None:
    with pytest.raises(DataError) as caught:
        cluster(np.array([[1.0], [1.0], [2.0]]), 3)
    assert str(caught.value) == (
        "2 different examples cannot make 3 clusters\n  where: partition\n  fix:   set num_clusters to 2 or less"
    )


def test_without_clusters_nothing_is_assigned() -> None:
    with pytest.raises(ConfigError) as caught:
        Embedding(num_clients=1).assign(np.zeros(3, np.int64), 1, np.random.default_rng(0), {})
    assert str(caught.value) == (
        'the data has no column "embedding_cluster"\n'
        "  where: partition\n"
        "  fix:   add what Embedding.columns_of gives to the columns; fedfuse.data.federate does"
    )


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"num_clients": 2, "num_clusters": 1}, "num_clusters must be at least 2, not 1"),
        ({"num_clients": 0}, "num_clients must be at least 1, not 0"),
        ({"num_clients": 2, "model": {"family": "cnn"}}, "a model is given, and features is auto"),
        ({"num_clients": 2, "features": "pixels"}, None),
    ],
)
def test_settings_of_an_embedding_partition_are_checked(settings: dict[str, Any], what: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(PARTITIONS.get("embedding"), settings, where="partition")
    assert what is None or caught.value.what == what
