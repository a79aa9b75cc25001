"""Training on all data in one place."""

from __future__ import annotations

from typing import Any

import torch

from fedfuse.core.artifact import detached_state
from fedfuse.core.examples import Examples
from fedfuse.methods.centralized import Centralized
from fedfuse.training import LocalSGD, train

SETTINGS = LocalSGD(num_epochs=2, batch_size=16)


def test_the_raw_training_data_is_uploaded_and_declared(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fed.fuse(Centralized(local=SETTINGS))
    upload, data = fed.upload("raw_data", "client_2"), fed.data["client_2"].train
    assert list(upload) == ["augment", "data/x", "data/y"]
    assert torch.equal(upload.tensor("data/x"), data.x)
    assert torch.equal(upload.tensor("data/y"), data.y)
    assert dict(Centralized.tasks()["raw_data"].uploads)["data/x"] == "the raw inputs"
    assert fed.cohort.ledger.totals()["upload_bytes_total"] >= sum(4 * d.train.x.numel() for d in fed.data.values())


def test_the_model_is_trained_on_the_union_of_the_data_in_client_order(federation: Any) -> None:
    fed = federation(width=4, depth=2, augment="flip")
    fused = fed.fuse(Centralized(local=SETTINGS))
    parts = [data.train for data in fed.data.values()]
    pooled = Examples(torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts]))
    module = fed.spec.build()
    rng = fed.job.rng.child("centralized")
    curves = train(module, pooled, SETTINGS, rng=rng, device=torch.device("cpu"), augment="flip")
    wanted = detached_state(module)
    assert all(torch.equal(wanted[name], fused.model.state[name]) for name in wanted)
    assert fed.job.facts["train_loss"] == curves["train_loss"][-1].item()


def test_the_data_of_a_client_that_is_away_is_not_used(federation: Any) -> None:
    fed = federation(width=4, depth=2, absent=[("raw_data", "client_0")], quorum=0.5)
    without = federation(width=4, depth=2)
    assert (
        fed.fuse(Centralized(local=SETTINGS)).model.digest() != without.fuse(Centralized(local=SETTINGS)).model.digest()
    )
    assert list(fed.cohort.missing) == ["client_0"]


def test_one_upload_serves_every_setting_of_the_server_s_training(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fed.fuse(Centralized(local=SETTINGS))
    fed.fuse(Centralized(local=LocalSGD(num_epochs=1, batch_size=8)))
    assert [entry.from_journal for entry in fed.cohort.ledger.entries] == [True] * 3
