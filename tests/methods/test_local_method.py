"""Every client alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedfuse.core.artifact import detached_state
from fedfuse.methods.local import Local
from fedfuse.training import LocalSGD, predict, train

SETTINGS = LocalSGD(num_epochs=2, batch_size=16)


def test_every_client_gets_the_model_that_it_would_train_without_any_federation(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fused = fed.fuse(Local(local=SETTINGS))
    assert fused.model is None
    assert list(fused.personal) == ["client_0", "client_1", "client_2"]
    assert fed.cohort.ledger.exchanges() == ["local_models"]
    for client_id, artifact in fused.personal.items():
        module = fed.spec.build()
        rng = fed.rng(client_id, "local_models")
        train(module, fed.data[client_id].train, SETTINGS, rng=rng, device=torch.device("cpu"))
        wanted = detached_state(module)
        assert sorted(wanted) == sorted(artifact.state)
        assert all(torch.equal(wanted[name], artifact.state[name]) for name in wanted)


def test_clients_with_models_of_their_own_keep_them(federation: Any, x: Tensor) -> None:
    fed = federation(client_models={"client_1": ("mlp", {"width": 5, "depth": 2})}, width=4, depth=2)
    fused = fed.fuse(Local(local=SETTINGS))
    assert [artifact.recipe["family"] for artifact in fused.personal.values()] == ["cnn", "mlp", "cnn"]
    assert all(predict(artifact.module(), x).shape == (20, 4) for artifact in fused.personal.values())


def test_a_client_that_is_away_has_no_model(federation: Any) -> None:
    fed = federation(width=4, depth=2, absent=[("local_models", "client_1")], quorum=0.6)
    assert list(fed.fuse(Local(local=SETTINGS)).personal) == ["client_0", "client_2"]
    assert fed.cohort.missing == {"client_1": "local_models: away"}
