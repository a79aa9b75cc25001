"""Mixtures of features, drawn from at the server."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fedfuse
from fedfuse.core.errors import ConfigError, DataError, QuorumError
from fedfuse.core.payload import Payload
from fedfuse.methods.fedpft import FedPFT, _check_draws
from fedfuse.methods.frozen import Backbone, HeadTraining
from fedfuse.training import predict

SMALL = Backbone(num_features=32)
SHORT = HeadTraining(num_epochs=5, batch_size=32)


@pytest.mark.parametrize(
    ("covariance", "shape"), [("spherical", (4, 2)), ("diagonal", (4, 2, 32)), ("full", (4, 2, 528))]
)
def test_shapes_and_precision_of_the_upload(
    federation: Any, x: Tensor, covariance: Any, shape: tuple[int, ...]
) -> None:
    fed = federation(width=4, depth=2)
    fused = fed.fuse(FedPFT(backbone=SMALL, covariance=covariance, num_mixtures=2, head_training=SHORT))
    upload = fed.upload("mixtures", "client_0")
    assert upload.tensor("mixtures/covariances").shape == shape
    assert upload.tensor("mixtures/means").shape == (4, 2, 32)
    assert {t.dtype for k, t in upload.group("mixtures").items() if k != "counts"} == {torch.float16}
    assert predict(fused.model.module(), x).shape == (20, 4)


def test_one_component_is_the_mean_of_the_class(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    module = fed.fuse(FedPFT(backbone=SMALL, precision="float32", head_training=SHORT)).model.module()
    for client_id, data in fed.data.items():
        features = predict(module.features, data.train.x)
        upload = fed.upload("mixtures", client_id)
        for c in range(4):
            own = features[data.train.y == c]
            torch.testing.assert_close(upload.tensor("mixtures/means")[c, 0], own.mean(0))
            torch.testing.assert_close(upload.tensor("mixtures/covariances")[c, 0], own.var(0, correction=0))
    assert upload.tensor("mixtures/counts").sum() == 40


def test_the_others_are_drawn_alike_when_a_client_is_away(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    method = FedPFT(backbone=SMALL, head_training=SHORT, num_draws=7)
    fed.fuse(method)
    rng = fed.job.rng.child("draws", "client_1")
    first = method._draws(fed.upload("mixtures", "client_1"), rng)
    again = method._draws(fed.upload("mixtures", "client_1"), rng)
    assert torch.equal(first[0], again[0])
    assert torch.bincount(first[1]).tolist() == [7, 7, 7, 7]


def test_one_example_and_a_client_that_is_away(federation: Any, x: Tensor) -> None:
    fed = federation(num_examples=(1, 30, 20), width=4, depth=2, absent=[("mixtures", "client_2")], quorum=0.6)
    fused = fed.fuse(FedPFT(backbone=SMALL, num_mixtures=3, head_training=SHORT))
    assert torch.isfinite(predict(fused.model.module(), x)).all()
    assert int(fed.upload("mixtures", "client_0").tensor("mixtures/weights").count_nonzero()) == 1


def test_features_too_large_for_half_precision_are_told_apart(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    for data in fed.data.values():
        data.train.x.mul_(1e5)
    with pytest.raises(QuorumError) as caught:
        fed.fuse(FedPFT(backbone=Backbone(kind="pixels")))
    assert "the features are too large for float16 where: client client_0, mixtures/means" in str(caught.value)
    assert "use method.precision: bfloat16 or float32" in str(caught.value)
    fed.fuse(FedPFT(backbone=Backbone(kind="pixels"), precision="bfloat16", head_training=SHORT))


def test_digits_with_very_uneven_clients() -> None:
    partition = {"scheme": "dirichlet", "num_clients": 5, "dirichlet_alpha": 0.1}
    config = {"data": {"source": "digits", "partition": partition}, "runtime": {"name": "local", "workers": 1}}
    method = {"name": "fedpft", "backbone": {"num_features": 128}, "covariance": "full"}
    result = fedfuse.run({**config, "method": {**method, "head_training": {"num_epochs": 20}}})
    assert result.accuracy is not None
    assert result.accuracy > 0.85


@pytest.mark.parametrize("name", ["num_mixtures", "num_draws"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FedPFT(**{name: 0})
    assert str(caught.value) == f"{name} is 0\n  where: method.{name}\n  fix:   give at least 1"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mixtures/counts", torch.tensor([-1, 3]), "it claims -1 to 3 examples of a class"),
        ("mixtures/counts", torch.tensor([10**12, 3]), "it claims 3 to 1,000,000,000,000 examples of a class"),
        ("mixtures/weights", torch.tensor([[1.0], [-1.0]]), "shares of its mixtures are negative or zero"),
        ("mixtures/weights", torch.tensor([[1.0], [0.0]]), "shares of its mixtures are negative or zero"),
    ],
)
def test_mixtures_that_nobody_can_draw_from_are_refused(key: str, value: torch.Tensor, message: str) -> None:
    good = {"mixtures/counts": torch.tensor([2, 3]), "mixtures/weights": torch.tensor([[1.0], [1.0]])}
    _check_draws("a", Payload(good))
    with pytest.raises(DataError) as caught:
        _check_draws("a", Payload({**good, key: value}))
    assert (caught.value.what, caught.value.where) == (message, "client a")
