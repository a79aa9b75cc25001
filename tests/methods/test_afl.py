"""Analytic federated learning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn import functional as F

import fedfuse
from fedfuse.core.artifact import Artifact
from fedfuse.core.errors import ConfigError
from fedfuse.methods.afl import AFL, read_sums
from fedfuse.methods.frozen import Backbone
from fedfuse.training import predict

SMALL = Backbone(num_features=32)


def test_the_head_is_scikit_learns_ridge_on_everybodys_features(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fused = fed.fuse(AFL(backbone=SMALL, ridge=0.01))
    module = fused.model.module()
    x = predict(module.features, torch.cat([d.train.x for d in fed.data.values()])).double()
    y = F.one_hot(torch.cat([d.train.y for d in fed.data.values()]), 4).double()
    penalty = 0.01 * float((x - x.mean(0)).square().sum()) / x.shape[1]
    theirs = Ridge(alpha=penalty, solver="cholesky").fit(x.numpy(), y.numpy())
    torch.testing.assert_close(module.head.weight.detach(), torch.from_numpy(theirs.coef_).float())
    torch.testing.assert_close(module.head.bias.detach(), torch.from_numpy(theirs.intercept_).float())


def test_the_partition_does_not_matter(federation: Any) -> None:
    fed = federation(num_clients=3, width=4, depth=2)
    fed.fuse(AFL(backbone=SMALL))
    parts = [read_sums(fed.upload("gram", c), 33) for c in fed.cohort.client_ids]
    alone = federation(num_clients=1, num_examples=(96,), width=4, depth=2)
    data = [d.train for d in fed.data.values()]
    only = alone.data["client_0"].train
    only.x[:], only.y[:] = torch.cat([d.x for d in data]), torch.cat([d.y for d in data])
    alone.fuse(AFL(backbone=SMALL))
    whole = read_sums(alone.upload("gram", "client_0"), 33)
    total = parts[2] + parts[0] + parts[1]
    torch.testing.assert_close(total.gram, whole.gram, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(total.targets, whole.targets, rtol=1e-12, atol=1e-10)


def test_the_upload_is_half_a_matrix_and_half_the_bytes_in_single_precision(federation: Any, x: Tensor) -> None:
    fed = federation(width=4, depth=2)
    double = fed.fuse(AFL(backbone=SMALL, ridge=0.01))
    upload = fed.upload("gram", "client_0")
    assert list(upload) == ["sums/gram", "sums/targets"]
    assert upload.tensor("sums/gram").shape == (33 * 34 // 2,)
    assert upload.tensor("sums/targets").dtype == torch.float64
    assert upload.tensor("sums/gram")[-1] == 24
    num_bytes = upload.num_bytes
    single = fed.fuse(AFL(backbone=SMALL, ridge=0.01, precision="float32"))
    assert fed.upload("gram", "client_0").num_bytes * 2 == num_bytes
    torch.testing.assert_close(
        predict(single.model.module(), x), predict(double.model.module(), x), rtol=1e-3, atol=1e-3
    )


def test_another_penalty_asks_nobody_again(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fed.fuse(AFL(backbone=SMALL))
    assert fed.job.facts["ridge"] > 0
    fed.fuse(AFL(backbone=SMALL, ridge=0.3))
    assert all(entry.from_journal for entry in fed.cohort.ledger.entries)
    assert fed.job.facts["ridge"] == 0.3


def test_one_example_and_a_client_that_is_away(federation: Any, x: Tensor, tmp_path: Any) -> None:
    fed = federation(num_examples=(1, 30, 20), width=4, depth=2, absent=[("gram", "client_2")], quorum=0.6)
    fused = fed.fuse(AFL(backbone=SMALL))
    assert fed.cohort.missing == {"client_2": "gram: away"}
    again = Artifact.read(fused.model.save(tmp_path / "artifact"))
    assert torch.equal(predict(again.module(), x), predict(fused.model.module(), x))


def test_digits_with_very_uneven_clients() -> None:
    partition = {"scheme": "dirichlet", "num_clients": 5, "dirichlet_alpha": 0.1}
    config = {"data": {"source": "digits", "partition": partition}, "runtime": {"name": "local", "workers": 1}}
    result = fedfuse.run({**config, "method": {"name": "afl", "backbone": {"num_features": 256}}})
    assert result.accuracy is not None
    assert result.accuracy > 0.95


@pytest.mark.parametrize("ridge", [-0.1, float("nan"), float("inf")])
def test_a_penalty_that_makes_no_sense_is_refused(ridge: float) -> None:
    with pytest.raises(ConfigError) as caught:
        AFL(ridge=ridge)
    assert str(caught.value) == (
        f"ridge is {ridge}\n  where: method.ridge\n  fix:   give 0 or more, or leave it out to choose it"
    )
