"""Nearest class mean and naive Bayes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import NearestCentroid
from torch import Tensor

import fedfuse
from fedfuse.core.errors import ConfigError
from fedfuse.methods.frozen import Backbone
from fedfuse.methods.prototypes import Prototypes, naive_bayes_head, nearest_mean_head
from fedfuse.ops.mixtures import DiagonalMoments, diagonal_moments
from fedfuse.training import predict

SMALL = Backbone(num_features=32)


def everything(fed: Any, module: Any) -> tuple[Any, Any]:
    """Features and labels of all clients together."""
    features = predict(module.features, torch.cat([d.train.x for d in fed.data.values()]))
    return features.double().numpy(), torch.cat([d.train.y for d in fed.data.values()]).numpy()


def test_it_is_scikit_learns_nearest_centroid_on_the_pooled_data(federation: Any, x: Tensor) -> None:
    fed = federation(width=4, depth=2)
    module = fed.fuse(Prototypes(backbone=SMALL)).model.module()
    theirs = NearestCentroid().fit(*everything(fed, module))
    wanted = theirs.predict(predict(module.features, x).double().numpy())
    assert predict(module, x).argmax(1).tolist() == wanted.tolist()
    assert list(fed.upload("prototypes", "client_0")) == ["prototypes/counts", "prototypes/means"]


def test_naive_bayes_is_scikit_learns_on_the_pooled_data(federation: Any, x: Tensor) -> None:
    fed = federation(width=4, depth=2)
    module = fed.fuse(Prototypes(backbone=SMALL, kind="naive_bayes")).model.module()
    theirs = GaussianNB(var_smoothing=1e-3).fit(*everything(fed, module))
    wanted = torch.from_numpy(theirs.predict_joint_log_proba(predict(module.features, x).double().numpy()))
    found = predict(module, x).double()
    torch.testing.assert_close(found - found[:, :1], wanted - wanted[:, :1], rtol=1e-3, atol=1e-2)
    assert "prototypes/squares" in fed.upload("prototypes", "client_0")


def test_distances_and_angles_by_hand() -> None:
    # Means (4, 0) and (0, 2) of one example each, class 2 unseen; the common mean is (2, 1).
    moments = diagonal_moments(torch.tensor([[4.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1]), 3)
    x = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    scores = nearest_mean_head(moments, cosine=False)(x)
    squared = torch.tensor([[1.0, 13.0], [16.0, 4.0]])
    torch.testing.assert_close(scores[:, 0] - scores[:, 1], (squared[:, 1] - squared[:, 0]) / 2)
    # The directions from the common mean are (2, -1) and (-2, 1), so x - (2, 1) = (1, -1) has the products 3 and -3.
    angles = nearest_mean_head(moments, cosine=True)(x)
    torch.testing.assert_close(angles[0, :2], torch.tensor([3.0, -3.0]) / 5**0.5)
    assert scores.argmax(1).tolist() == [0, 1]
    assert angles[:, 2].max() < -1e30
    assert naive_bayes_head(moments, 1e-3)(x).argmax(1).tolist() == [0, 1]


def test_one_class_alone_is_always_the_answer() -> None:
    moments = DiagonalMoments(torch.tensor([0.0, 1.0]).double(), torch.zeros(2, 3).double(), torch.zeros(2, 3).double())
    for head in (nearest_mean_head(moments, cosine=True), naive_bayes_head(moments, 1e-3)):
        assert head(torch.randn(5, 3)).argmax(1).tolist() == [1] * 5


@pytest.mark.parametrize("kind", ["euclidean", "cosine", "naive_bayes"])
def test_one_example_and_a_client_that_is_away(federation: Any, x: Tensor, kind: Any) -> None:
    fed = federation(num_examples=(1, 30, 20), width=4, depth=2, absent=[("prototypes", "client_2")], quorum=0.6)
    fused = fed.fuse(Prototypes(backbone=SMALL, kind=kind))
    assert torch.isfinite(predict(fused.model.module(), x)).all()


def test_digits_with_very_uneven_clients() -> None:
    partition = {"scheme": "dirichlet", "num_clients": 5, "dirichlet_alpha": 0.1}
    config = {"data": {"source": "digits", "partition": partition}, "runtime": {"name": "local", "workers": 1}}
    result = fedfuse.run({**config, "method": {"name": "prototypes", "kind": "naive_bayes"}})
    assert result.accuracy is not None
    assert result.accuracy > 0.9


def test_a_floor_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        Prototypes(variance_floor=0.0)
    assert str(caught.value) == (
        "variance_floor is 0.0\n  where: method.variance_floor\n  fix:   give a number above 0"
    )
