"""FedAvg with a calibrated head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedfuse
from fedfuse.core.errors import ConfigError
from fedfuse.methods.ccvr import CCVR, CalibratedHead
from fedfuse.methods.fedavg import FedAvg
from fedfuse.methods.tasks import read_moments
from fedfuse.ops.moments import class_moments, lda_head, pool
from fedfuse.training import LocalSGD, predict

SETTINGS = LocalSGD(num_epochs=2, batch_size=16)
SHORT = CalibratedHead(num_draws=20, num_epochs=1)


def test_it_is_fedavg_but_for_the_head(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    averaged = fed.fuse(FedAvg(local=SETTINGS)).model
    fused = fed.fuse(CCVR(local=SETTINGS, head=SHORT)).model
    assert fed.cohort.ledger.exchanges() == ["local_models", "moments"]
    assert [entry.from_journal for entry in fed.cohort.ledger.entries] == [True] * 3 + [False] * 3
    assert fused.recipe == averaged.recipe
    changed = [name for name, tensor in fused.state.items() if not torch.equal(tensor, averaged.state[name])]
    assert len(changed) == 2
    assert all(averaged.state[name].shape[0] == 4 for name in changed)


def test_the_moments_are_those_of_the_pooled_features_per_class(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    averaged = fed.fuse(FedAvg(local=SETTINGS)).model.module()
    fed.fuse(CCVR(local=SETTINGS, head=SHORT))
    body = nn.Sequential(*list(averaged.children())[:-1])
    features = predict(body, torch.cat([d.train.x for d in fed.data.values()]))
    wanted = class_moments(features, torch.cat([d.train.y for d in fed.data.values()]), 4, per_class=True)
    found = pool(read_moments(fed.upload("moments", c)) for c in fed.cohort.client_ids)
    torch.testing.assert_close(found.scatter, wanted.scatter, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.means, wanted.means, rtol=1e-5, atol=1e-5)


def test_with_an_lda_head_it_is_the_lda_of_the_pooled_features(federation: Any, x: Tensor) -> None:
    fed = federation(width=4, depth=2)
    averaged = fed.fuse(FedAvg(local=SETTINGS)).model.module()
    body = nn.Sequential(*list(averaged.children())[:-1])
    features = predict(body, torch.cat([d.train.x for d in fed.data.values()]))
    labels = torch.cat([d.train.y for d in fed.data.values()])
    weights, biases = lda_head(class_moments(features, labels, 4, per_class=False), shrinkage=0.3)
    fused = fed.fuse(CCVR(local=SETTINGS, head=CalibratedHead(kind="lda", shrinkage=0.3)))
    wanted = predict(body, x).double() @ weights.T + biases
    torch.testing.assert_close(predict(fused.model.module(), x).double(), wanted, rtol=1e-3, atol=1e-3)
    assert fed.upload("moments", "client_0").tensor("moments/scatter").ndim == 1


def test_settings_of_the_head_keep_the_papers_way_where_they_say_nothing() -> None:
    from fedfuse.core.settings import from_json

    assert from_json(CCVR, {"head": {"num_draws": 200}}, where="method").head == CalibratedHead(num_draws=200)
    assert CCVR().head.kind == "calibrated"


def test_after_many_rounds(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fed.fuse(CCVR(local=SETTINGS, num_rounds=2, head=SHORT))
    assert fed.cohort.ledger.exchanges() == ["round_0", "round_1", "moments"]


def test_a_head_without_a_bias_gets_one(federation: Any, x: Tensor) -> None:
    from dataclasses import replace

    from fedfuse.models.graph import user_spec

    fed = federation(width=4, depth=2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 4, bias=False))
    spec = user_spec(net, input_shape=(1, 8, 8), num_classes=4, seed=0)
    fed.runtime.inner._sides = {c: replace(side, model=spec) for c, side in fed.runtime.inner._sides.items()}
    fed.job = replace(fed.job, model=spec)
    fused = fed.fuse(CCVR(local=SETTINGS, head=CalibratedHead(kind="lda")))
    assert fused.model.recipe["kind"] == "headed"
    assert predict(fused.model.module(), x).shape == (20, 4)


def test_clients_with_one_example_or_away(federation: Any, x: Tensor) -> None:
    absent = [("local_models", "client_1"), ("moments", "client_2")]
    fed = federation("mlp", num_examples=(1, 30, 20), width=4, depth=2, absent=absent, quorum=0.6)
    fused = fed.fuse(CCVR(local=SETTINGS, head=SHORT))
    assert torch.isfinite(predict(fused.model.module(), x)).all()
    assert sorted(fed.cohort.missing) == ["client_1", "client_2"]


def test_different_models_and_heads_without_moments_are_refused(federation: Any) -> None:
    fed = federation(client_models={"client_1": ("mlp", {"width": 5, "depth": 2})}, width=4, depth=2)
    with pytest.raises(ConfigError, match="weights of different architectures cannot be averaged"):
        fed.fuse(CCVR(local=SETTINGS))
    assert fed.cohort.ledger.exchanges() == []
    with pytest.raises(ConfigError) as caught:
        CCVR(head=CalibratedHead(kind="average"))
    assert str(caught.value) == (
        "the head average needs no moments, so nothing is calibrated\n"
        "  where: method.head.kind\n"
        "  fix:   use head.kind: calibrated or lda, or the method fedavg"
    )


def test_on_digits_the_calibrated_head_mends_fedavg() -> None:
    partition = {"scheme": "dirichlet", "num_clients": 3, "dirichlet_alpha": 0.1}
    config = {
        "data": {"source": "digits", "limit": 600, "partition": partition},
        "model": {"family": "cnn", "width": 8, "depth": 2},
        "runtime": {"name": "local", "workers": 1},
    }
    training = {"local": {"num_epochs": 4, "batch_size": 32}}
    plain = fedfuse.run({**config, "method": {"name": "fedavg", **training}})
    mended = fedfuse.run({**config, "method": {"name": "ccvr", **training, "head": {"num_draws": 200}}})
    assert plain.accuracy is not None
    assert mended.accuracy is not None
    assert mended.accuracy > plain.accuracy + 0.1
