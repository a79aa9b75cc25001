"""Embeddings by a model, as a configuration asks for them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import fedfuse
from fedfuse import models
from fedfuse.core.errors import ConfigError
from fedfuse.data.partitions.embedding import cluster
from fedfuse.experiment import embedding, read_config, resolve
from fedfuse.experiment.embedding import embeddings
from fedfuse.experiment.setting import Loader
from fedfuse.models.blocks import cut_spec


def with_partition(config: dict[str, Any], **settings: Any) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    partition = {"scheme": "embedding", "num_clients": 3, "num_clusters": 4, "features": "model", **settings}
    changed["data"]["partition"] = partition
    return changed


def test_a_configuration_splits_by_its_own_model(config: dict[str, Any]) -> None:
    result = fedfuse.run(with_partition(config, dirichlet_alpha=0.2))
    assert sum(client["num_examples"] + client["num_validation"] for client in result.clients.values()) == 200
    partition = resolve(read_config(with_partition(config)))["data"]["partition"]
    assert (partition["scheme"], partition["features"], partition["model"]) == ("embedding", "model", {})


def test_vectors_are_what_the_head_of_a_classifier_sees(config: dict[str, Any]) -> None:
    x = torch.rand(5, 1, 8, 8)
    found = embeddings("mlp", {"width": 8, "depth": 2}, x, 10)
    spec = models.spec("mlp", {"width": 8, "depth": 2}, input_shape=(1, 8, 8), num_classes=10, seed=0)
    pieces = cut_spec(spec, 1).copy()
    assert found.shape == (5, 8)
    torch.testing.assert_close(pieces.head(found), spec.build().eval()(x))


def test_vectors_are_made_once_for_all_seeds(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = embedding.embeddings

    def counted(*args: Any) -> torch.Tensor:
        calls.append(args[0])
        return original(*args)

    monkeypatch.setattr(embedding, "embeddings", counted)
    loader = Loader(read_config(with_partition(config)))
    first, second = loader.setting(1), loader.setting(2)
    assert calls == ["mlp"]
    pairs = zip(first.data.positions.values(), second.data.positions.values(), strict=True)
    assert any(not np.array_equal(one, two) for one, two in pairs)
    Loader(read_config(with_partition(config, num_clusters=5)), like=loader).setting(1)
    assert calls == ["mlp"]
    other = with_partition(config, model={"family": "mlp", "width": 4})
    Loader(read_config(other), like=loader).setting(1)
    assert calls == ["mlp", "mlp"]


def test_a_model_of_its_own_needs_a_family(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        Loader(read_config(with_partition(config, model={"width": 4}))).setting(1)
    assert (caught.value.what, caught.value.where) == (
        'the setting "family" is missing',
        "data.partition.model.family",
    )
    with pytest.raises(ConfigError) as caught:
        Loader(read_config(with_partition(config, model={"family": "mlp", "breadth": 4}))).setting(1)
    assert (caught.value.what, caught.value.where) == ('unknown setting "breadth"', "data.partition.model.breadth")


def test_a_language_model_is_asked_for_its_hidden_states() -> None:
    pytest.importorskip("transformers")
    config = {"model_type": "llama", "vocab_size": 20, "hidden_size": 16, "intermediate_size": 16}
    settings = {"config": {**config, "num_hidden_layers": 1, "num_attention_heads": 2}, "task": "causal_lm"}
    tokens = torch.tensor([[1.0, 2.0, 3.0, -1.0], [7.0, 8.0, 9.0, 9.0]]).repeat(6, 1)
    tokens[2:, 0] += torch.arange(10) // 2 % 3
    x = torch.cat([tokens, torch.ones_like(tokens)], 1)
    found = embeddings("transformers", settings, x, 2)
    assert found.shape == (12, 16)
    assert cluster(found.double().numpy(), 2).tolist() == [0, 1] * 6
    # The mean over a text does not see its padding.
    longer = torch.cat([tokens, torch.full((12, 2), -1.0), torch.ones(12, 6)], 1)
    torch.testing.assert_close(embeddings("transformers", settings, longer, 2), found)
