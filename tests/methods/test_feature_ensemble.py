"""Isolated models under one common head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedfuse.core.artifact import Artifact
from fedfuse.core.errors import ModelError
from fedfuse.methods.feature_ensemble import FeatureEnsemble
from fedfuse.methods.heads import Head
from fedfuse.methods.tasks import client_artifact, read_moments
from fedfuse.ops.moments import class_moments, lda_head, pool
from fedfuse.training import LocalSGD, predict

SETTINGS = LocalSGD(num_epochs=2, batch_size=16)


def client_modules(fed: Any) -> list[nn.Module]:
    return [
        client_artifact(fed.job, c, fed.upload("local_models", c)).module()
        for c in fed.cohort.client_ids
        if ("local_models", c) in fed.runtime.received
    ]


def features(fed: Any, x: Tensor) -> list[Tensor]:
    """Every client's features, by taking the last layer off its model."""
    return [predict(nn.Sequential(*list(module.children())[:-1]), x) for module in client_modules(fed)]


def test_the_ensemble_head_gives_the_mean_of_the_clients_logits(federation: Any, x: Tensor) -> None:
    fed = federation(width=4, depth=2)
    fused = fed.fuse(FeatureEnsemble(local=SETTINGS, head=Head(kind="ensemble")))
    assert fed.cohort.ledger.exchanges() == ["local_models"]
    wanted = torch.stack([predict(module, x) for module in client_modules(fed)]).mean(0)
    torch.testing.assert_close(predict(fused.model.module(), x), wanted, rtol=1e-4, atol=1e-5)


def test_the_average_head_sees_the_mean_of_the_features(federation: Any, x: Tensor) -> None:
    fed = federation(width=4, depth=2)
    fused = fed.fuse(FeatureEnsemble(local=SETTINGS, head=Head(kind="average")))
    heads = [list(module.children())[-1] for module in client_modules(fed)]
    weight = torch.stack([head.weight for head in heads]).mean(0)
    bias = torch.stack([head.bias for head in heads]).mean(0)
    wanted = torch.stack(features(fed, x)).mean(0) @ weight.T + bias
    torch.testing.assert_close(predict(fused.model.module(), x), wanted.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sees", ["concat", "mean"])
def test_the_lda_head_is_that_of_the_pooled_data(federation: Any, x: Tensor, sees: Any) -> None:
    fed = federation(width=4, depth=2)
    fused = fed.fuse(FeatureEnsemble(local=SETTINGS, head=Head(features=sees, shrinkage=0.1)))
    assert fed.cohort.ledger.exchanges() == ["local_models", "moments"]

    def seen(inputs: Tensor) -> Tensor:
        parts = features(fed, inputs)
        return torch.cat(parts, 1) if sees == "concat" else torch.stack(parts).mean(0)

    everything = torch.cat([data.train.x for data in fed.data.values()])
    labels = torch.cat([data.train.y for data in fed.data.values()])
    moments = class_moments(seen(everything), labels, 4, per_class=False)
    weights, biases = lda_head(moments, shrinkage=0.1)
    wanted = seen(x).double() @ weights.T + biases
    torch.testing.assert_close(predict(fused.model.module(), x).double(), wanted, rtol=1e-3, atol=1e-3)


def test_every_client_is_sent_all_models_and_uploads_moments_alone(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fed.fuse(FeatureEnsemble(local=SETTINGS))
    for client_id in fed.cohort.client_ids:
        message, upload = fed.message("moments", client_id), fed.upload("moments", client_id)
        assert message["num_columns"] == 3
        for column, owner in enumerate(fed.cohort.client_ids):
            own, prefix = fed.upload("local_models", owner), f"levels.0.columns.{column}.block."
            sent = {k.removeprefix(prefix): t for k, t in message.group("net").items() if k.startswith(prefix)}
            assert sent
            assert all(torch.equal(tensor, own.tensor(f"model/{name}")) for name, tensor in sent.items())
        assert list(upload) == ["moments/counts", "moments/means", "moments/scatter"]
        assert upload.tensor("moments/scatter").shape == (12 * 13 // 2,)
    pooled = pool(read_moments(fed.upload("moments", c)) for c in fed.cohort.client_ids)
    assert pooled.counts.sum() == 24 + 32 + 40


def test_the_calibrated_head_asks_for_a_scatter_per_class(federation: Any, x: Tensor) -> None:
    fed = federation(width=4, depth=2)
    head = Head(kind="calibrated", num_draws=20, num_epochs=1)
    fused = fed.fuse(FeatureEnsemble(local=SETTINGS, head=head))
    assert fed.upload("moments", "client_0").tensor("moments/scatter").shape == (4, 10)
    assert predict(fused.model.module(), x).shape == (20, 4)


def test_clients_with_different_models_share_a_head(federation: Any, x: Tensor, tmp_path: Any) -> None:
    own = {"client_1": ("cnn", {"width": 6, "depth": 2}), "client_2": ("mlp", {"width": 5, "depth": 2})}
    fed = federation(client_models=own, width=4, depth=2)
    fused = fed.fuse(FeatureEnsemble(local=SETTINGS))
    assert fused.model.recipe["head"] == [4 + 6 + 5, 4]
    assert fed.upload("moments", "client_0").tensor("moments/means").shape == (4, 15)
    again = Artifact.read(fused.model.save(tmp_path / "artifact"))
    assert torch.equal(predict(again.module(), x), predict(fused.model.module(), x))

    with pytest.raises(ModelError) as caught:
        fed.fuse(FeatureEnsemble(local=SETTINGS, head=Head(kind="average")))
    assert str(caught.value) == (
        "heads of different widths cannot be averaged\n"
        "  fix:   use head.kind: lda or ensemble for clients with different models"
    )
    assert fed.cohort.ledger.exchanges() == []


def test_clients_that_are_away_leave_what_they_gave(federation: Any) -> None:
    absent = [("local_models", "client_0"), ("moments", "client_2")]
    fed = federation(width=4, depth=2, absent=absent, quorum=0.6)
    fused = fed.fuse(FeatureEnsemble(local=SETTINGS))
    assert len(fused.model.recipe["levels"][0]) == 2
    assert sorted(c for e, c in fed.runtime.received if e == "moments") == ["client_0", "client_1"]
    assert fed.cohort.missing == {"client_0": "local_models: away", "client_2": "moments: away"}


def test_another_head_trains_nobody_again(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fed.fuse(FeatureEnsemble(local=SETTINGS, head=Head(kind="ensemble")))
    fed.fuse(FeatureEnsemble(local=SETTINGS))
    asked = [(e.exchange, e.from_journal) for e in fed.cohort.ledger.entries]
    assert asked == [("local_models", True)] * 3 + [("moments", False)] * 3
    fed.fuse(FeatureEnsemble(local=SETTINGS, head=Head(shrinkage=0.5)))
    assert len({entry.key for entry in fed.journal.entries()}) == 9
