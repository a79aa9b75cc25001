"""One federation per model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedfuse.methods.fedavg import FedAvg
from fedfuse.methods.local import Local
from fedfuse.methods.size_groups import SizeGroups
from fedfuse.training import LocalSGD

SETTINGS = LocalSGD(num_epochs=2, batch_size=16)
TWO = {"client_1": ("mlp", {"width": 5, "depth": 2})}


def test_clients_with_equal_models_share_their_weighted_mean_and_the_other_stays_alone(federation: Any) -> None:
    fed = federation("mlp", client_models=TWO, width=8, depth=2)
    alone = fed.fuse(Local(local=SETTINGS)).personal
    fused = fed.fuse(SizeGroups(local=SETTINGS))
    # It is the question of all methods with one round.
    assert all(entry.from_journal for entry in fed.cohort.ledger.entries)
    assert fused.model is None
    assert list(fused.personal) == ["client_0", "client_1", "client_2"]
    assert fused.personal["client_1"].digest() == alone["client_1"].digest()
    assert fused.personal["client_0"].digest() == fused.personal["client_2"].digest()
    assert fed.job.facts["groups"] == [["client_0", "client_2"], ["client_1"]]
    for name, tensor in fused.personal["client_0"].state.items():
        first, second = (alone[c].state[name].double() for c in ("client_0", "client_2"))
        assert torch.allclose(tensor, ((24 * first + 40 * second) / 64).float(), atol=1e-6)


@pytest.mark.parametrize("num_rounds", [1, 2])
def test_with_equal_models_it_is_fedavg(federation: Any, num_rounds: int) -> None:
    fed = federation(width=4, depth=2)
    wanted = fed.fuse(FedAvg(local=SETTINGS, num_rounds=num_rounds)).model
    assert fed.fuse(SizeGroups(local=SETTINGS, num_rounds=num_rounds)).model.digest() == wanted.digest()
    assert all(entry.from_journal for entry in fed.cohort.ledger.entries)


def test_each_group_gets_its_own_mean_in_the_second_round(federation: Any) -> None:
    fed = federation("mlp", client_models=TWO, width=8, depth=2)
    fed.fuse(SizeGroups(local=SETTINGS, num_rounds=2))
    own = fed.upload("round_0", "client_1").group("model")
    sent = fed.message("round_1", "client_1").group("model")
    assert all(torch.equal(sent[name], own[name]) for name in own)
    assert fed.message("round_1", "client_0").digest() == fed.message("round_1", "client_2").digest()


def test_a_client_that_is_away_gets_the_model_of_its_group_if_there_is_one(federation: Any) -> None:
    missing = [("local_models", "client_2")]
    fed = federation("mlp", client_models=TWO, width=8, depth=2, absent=missing, quorum=0.6)
    assert list(fed.fuse(SizeGroups(local=SETTINGS)).personal) == ["client_0", "client_1", "client_2"]
    fed = federation("mlp", client_models=TWO, width=8, depth=2, absent=[("local_models", "client_1")], quorum=0.6)
    assert list(fed.fuse(SizeGroups(local=SETTINGS)).personal) == ["client_0", "client_2"]
