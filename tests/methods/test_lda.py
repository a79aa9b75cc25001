"""Linear discriminant analysis from pooled moments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

import fedfuse
from fedfuse.core.errors import ConfigError
from fedfuse.methods.frozen import Backbone
from fedfuse.methods.lda import LDA
from fedfuse.training import predict

SMALL = Backbone(num_features=32)


@pytest.mark.parametrize(("shrinkage", "priors"), [(0.1, "pooled"), (0.5, "uniform")])
def test_it_is_scikit_learns_lda_on_the_pooled_data(federation: Any, x: Tensor, shrinkage: float, priors: Any) -> None:
    fed = federation(width=4, depth=2)
    module = fed.fuse(LDA(backbone=SMALL, shrinkage=shrinkage, priors=priors)).model.module()
    features = predict(module.features, torch.cat([d.train.x for d in fed.data.values()])).double().numpy()
    labels = torch.cat([d.train.y for d in fed.data.values()]).numpy()
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(features, labels)
    seen = predict(module.features, x).double().numpy()
    wanted = torch.from_numpy(theirs.decision_function(seen))
    if priors == "uniform":
        wanted = wanted - torch.from_numpy(theirs.priors_).log()
    found = predict(module, x).double()
    # Scores count up to a number that all classes share.
    torch.testing.assert_close(found - found[:, :1], wanted - wanted[:, :1], rtol=1e-3, atol=1e-3)


def test_moments_are_all_that_is_uploaded(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fed.fuse(LDA(backbone=SMALL))
    upload = fed.upload("moments", "client_0")
    assert list(upload) == ["moments/counts", "moments/means", "moments/scatter"]
    assert upload.tensor("moments/scatter").shape == (32 * 33 // 2,)
    fed.fuse(LDA(backbone=SMALL, shrinkage=0.9))
    assert all(entry.from_journal for entry in fed.cohort.ledger.entries)


def test_one_example_and_a_client_that_is_away(federation: Any, x: Tensor) -> None:
    fed = federation(num_examples=(1, 30, 20), width=4, depth=2, absent=[("moments", "client_2")], quorum=0.6)
    fused = fed.fuse(LDA(backbone=SMALL))
    assert torch.isfinite(predict(fused.model.module(), x)).all()


def test_digits_with_very_uneven_clients() -> None:
    partition = {"scheme": "dirichlet", "num_clients": 5, "dirichlet_alpha": 0.1}
    config = {"data": {"source": "digits", "partition": partition}, "runtime": {"name": "local", "workers": 1}}
    result = fedfuse.run({**config, "method": {"name": "lda", "backbone": {"num_features": 256}}})
    assert result.accuracy is not None
    assert result.accuracy > 0.95


def test_a_shrinkage_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        LDA(shrinkage=1.5)
    assert str(caught.value) == (
        "shrinkage is 1.5\n  where: method.shrinkage\n  fix:   give a number in [0, 1], or leave it out"
    )
