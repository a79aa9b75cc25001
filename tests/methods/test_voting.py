"""Polychotomous voting: what crosses, and the votes by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import fedfuse
from fedfuse.core.artifact import load_state
from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.examples import Examples
from fedfuse.methods.voting import Voting
from fedfuse.training import LocalSGD, predict

SETTINGS = LocalSGD(num_epochs=2, batch_size=16)


def test_confusions_are_pooled_and_vote(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fused = fed.fuse(Voting(local=SETTINGS, smoothing=2.0))
    assert fed.cohort.ledger.exchanges() == ["local_models", "confusions"]
    counts, guesses = torch.zeros(3, 4, 4, dtype=torch.float64), []
    for k, client_id in enumerate(fed.cohort.client_ids):
        module = fed.spec.build()
        load_state(module, fed.upload("local_models", client_id).group("model"))
        for data in fed.data.values():
            for true, said in zip(data.validation.y, predict(module, data.validation.x).argmax(1), strict=True):
                counts[k, true, said] += 1
        guesses.append(predict(module, fed.test.x).argmax(1))
    p = (counts + 2 / 4) / (counts.sum(2, keepdim=True) + 2)
    wanted = torch.stack([torch.stack([p[k, :, g[i]] for k, g in enumerate(guesses)]).prod(0) for i in range(60)])
    found = predict(fused.model.module(), fed.test.x)
    torch.testing.assert_close(found.double().exp(), wanted, rtol=1e-4, atol=1e-7)


def test_only_counts_leave_the_client(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fed.fuse(Voting(local=SETTINGS))
    upload = fed.upload("confusions", "client_1")
    assert list(upload) == ["confusion", "num_proxy"]
    assert upload.tensor("confusion").dtype == torch.int32
    assert upload.tensor("confusion").sum((1, 2)).tolist() == [8, 8, 8]


def test_one_client_without_proxy_data_is_passed_over_and_none_at_all_is_an_error(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    sides = fed.runtime.inner._sides

    def empty(client_id: str) -> None:
        data = sides[client_id].data
        bare = dataclasses.replace(data, validation=Examples(data.validation.x[:0], data.validation.y[:0]))
        sides[client_id] = dataclasses.replace(sides[client_id], data=bare)

    empty("client_2")
    fused = fed.fuse(Voting(local=SETTINGS))
    assert fused.model.state["combiner.log_likelihoods"].shape == (3, 4, 4)
    empty("client_0")
    empty("client_1")
    again = federation(width=4, depth=2)
    again.runtime.inner._sides.update(sides)
    with pytest.raises(DataError, match="no client has validation data"):
        again.fuse(Voting(local=SETTINGS))


def test_no_smoothing_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        Voting(smoothing=0.0)
    assert str(caught.value) == "smoothing is 0.0\n  where: method.smoothing\n  fix:   give a number above 0"


def test_it_learns_digits() -> None:
    config: dict[str, Any] = {
        "data": {"source": "digits", "limit": 400, "test_limit": 200, "partition": {"scheme": "iid", "num_clients": 3}},
        "model": {"family": "mlp", "width": 32, "depth": 1},
        "runtime": {"name": "local", "workers": 1},
    }
    local = {"num_epochs": 5, "batch_size": 16, "learning_rate": 0.05}
    result = fedfuse.run({**config, "method": {"name": "voting", "local": local}})
    assert result.accuracy is not None
    assert result.accuracy > 0.8
