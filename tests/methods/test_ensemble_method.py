"""All clients' models side by side, against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedfuse.core.artifact import Artifact
from fedfuse.methods.ensemble import EnsembleMethod
from fedfuse.methods.tasks import client_artifact
from fedfuse.models.ensemble import Ensemble
from fedfuse.training import LocalSGD, predict

SETTINGS = LocalSGD(num_epochs=2, batch_size=16)

LOGITS = np.array([[[2.0, 1.0, 0.0]], [[0.0, 1.5, 0.0]], [[0.0, 0.0, 0.5]]])
"""Three members, one input, three classes."""


class Fixed(nn.Module):
    def __init__(self, logits: np.ndarray) -> None:
        super().__init__()
        self.logits = torch.from_numpy(logits).float()

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


def softmax(z: np.ndarray) -> np.ndarray:
    powers = np.exp(z - z.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def combined(combine: str, weights: np.ndarray | None = None) -> np.ndarray:
    net = Ensemble([Fixed(member) for member in LOGITS], combine=combine, num_classes=3)
    if weights is not None:
        net.weights.copy_(torch.from_numpy(weights))
    return net(torch.zeros(1, 1)).numpy()


def test_mean_logits_by_hand() -> None:
    assert combined("mean_logits") == pytest.approx(np.array([[2 / 3, 2.5 / 3, 0.5 / 3]]), abs=1e-6)


def test_mean_probabilities_by_hand() -> None:
    assert combined("mean_probabilities") == pytest.approx(np.log(softmax(LOGITS).mean(0)), abs=1e-6)


def test_vote_by_hand() -> None:
    # One vote for each class, so the shares are equal; a class without a vote would have probability zero.
    assert np.exp(combined("vote")) == pytest.approx(np.full((1, 3), 1 / 3), abs=1e-6)


def test_label_count_by_hand() -> None:
    weights = np.array([[1.0, 0.0, 0.2], [0.0, 0.25, 0.8], [0.0, 0.75, 0.0]])
    wanted = (weights[:, None] * softmax(LOGITS)).sum(0)
    assert np.exp(combined("label_count", weights)) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("combine", ["mean_logits", "mean_probabilities", "vote", "label_count"])
def test_the_artifact_combines_the_uploaded_models(federation: Any, x: Tensor, combine: Any) -> None:
    fed = federation(width=4, depth=2)
    fused = fed.fuse(EnsembleMethod(local=SETTINGS, combine=combine))
    assert fed.cohort.ledger.exchanges() == ["local_models"]
    ids = fed.cohort.client_ids
    uploads = {c: fed.upload("local_models", c) for c in ids}
    logits = np.stack([predict(client_artifact(fed.job, c, uploads[c]).module(), x).numpy() for c in ids]).astype(float)
    counts = np.stack([np.bincount(fed.data[c].train.y.numpy(), minlength=4) for c in ids])
    shares = counts / counts.sum(0)
    wanted = {
        "mean_logits": logits.mean(0),
        "mean_probabilities": np.log(softmax(logits).mean(0) + 1e-12),
        "vote": np.log(np.eye(4)[logits.argmax(2)].mean(0) + 1e-12),
        "label_count": np.log((shares[:, None] * softmax(logits)).sum(0) + 1e-12),
    }[combine]
    assert predict(fused.model.module(), x).numpy() == pytest.approx(wanted, abs=1e-4)


def test_a_class_that_nobody_holds_never_wins_by_label_counts(federation: Any, x: Tensor) -> None:
    fed = federation(width=4, depth=2)
    for client_id, data in fed.data.items():
        rows = torch.nonzero(data.train.y != 3).flatten()
        object.__setattr__(fed.data[client_id], "train", data.train.subset(rows))
    fused = fed.fuse(EnsembleMethod(local=SETTINGS, combine="label_count"))
    assert fused.model.state["weights"].sum(0).tolist() == pytest.approx([1, 1, 1, 0], abs=1e-6)
    assert 3 not in predict(fused.model.module(), x).argmax(1)


def test_members_may_differ_in_architecture(federation: Any, x: Tensor, tmp_path: Any) -> None:
    fed = federation(client_models={"client_1": ("mlp", {"width": 5, "depth": 1})}, width=4, depth=2)
    fused = fed.fuse(EnsembleMethod(local=SETTINGS))
    again = Artifact.read(fused.model.save(tmp_path / "artifact"))
    assert [member["family"] for member in again.recipe["members"]] == ["cnn", "mlp", "cnn"]
    assert torch.equal(predict(again.module(), x), predict(fused.model.module(), x))


def test_a_client_that_is_away_is_no_member(federation: Any) -> None:
    fed = federation(width=4, depth=2, absent=[("local_models", "client_1")], quorum=0.6)
    model = fed.fuse(EnsembleMethod(local=SETTINGS)).model
    assert len(model.recipe["members"]) == 2
    assert model.state["weights"].tolist() == [[0.5] * 4] * 2
