"""Regression mean: linear layers in closed form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import fedfuse
from fedfuse.core.errors import ConfigError
from fedfuse.methods.fedavg import FedAvg
from fedfuse.methods.regmean import RegMean
from fedfuse.training import LocalSGD, evaluate

SETTINGS = LocalSGD(num_epochs=3, batch_size=16)


def test_a_linear_layer_solves_the_regression_on_all_clients_inputs(federation: Any) -> None:
    fed = federation("mlp", width=8, depth=0, input_shape=(6,))
    fused = fed.fuse(RegMean(local=SETTINGS, off_diagonal=1.0, fuse_biases=True)).model.state
    rows, outputs = [], []
    for client_id, data in fed.data.items():
        state = fed.upload("local_models", client_id).group("model")
        x = torch.cat([data.train.x, torch.ones(len(data.train), 1)], 1).double()
        rows.append(x)
        outputs.append(x @ torch.cat([state["1.weight"], state["1.bias"][:, None]], 1).double().T)
    wanted = torch.linalg.lstsq(torch.cat(rows), torch.cat(outputs)).solution.T
    torch.testing.assert_close(fused["1.weight"].double(), wanted[:, :-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused["1.bias"].double(), wanted[:, -1], rtol=1e-4, atol=1e-5)


def test_biases_and_all_else_are_averaged_by_default(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    found = fed.fuse(RegMean(local=SETTINGS)).model.state
    mean = fed.fuse(FedAvg(local=SETTINGS)).model.state
    fused = {name for name in mean if not torch.allclose(found[name].double(), mean[name].double(), rtol=1e-4)}
    weights = {
        f"{name}.weight" for name, m in fed.spec.build().named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))
    }
    assert fused == weights


def test_only_diagonals_weigh_each_input_by_its_size(federation: Any) -> None:
    fed = federation("mlp", num_clients=2, width=8, depth=0, input_shape=(6,))
    fused = fed.fuse(RegMean(local=SETTINGS, off_diagonal=0.0)).model.state["1.weight"].double()
    sizes = torch.stack([data.train.x.double().square().sum(0) for data in fed.data.values()])
    values = torch.stack([fed.upload("local_models", c).tensor("model/1.weight").double() for c in fed.data])
    wanted = (sizes[:, None] * values).sum(0) / sizes.sum(0)
    torch.testing.assert_close(fused, wanted, rtol=1e-4, atol=1e-6)


def test_clients_get_their_own_model_back_and_send_half_of_each_matrix(federation: Any) -> None:
    fed = federation("mlp", width=8, depth=1)
    fed.fuse(RegMean(local=SETTINGS))
    own = fed.upload("local_models", "client_1").group("model")
    assert all(fed.message("grams", "client_1").group("model")[name].equal(t) for name, t in own.items())
    grams = fed.upload("grams", "client_1")
    assert {key: tuple(grams.tensor(key).shape) for key in grams} == {
        "grams/1": (65 * 66 // 2,),
        "grams/3": (9 * 10 // 2,),
    }


def test_matrices_are_asked_once_for_all_scalings(federation: Any) -> None:
    fed = federation("mlp", width=8, depth=1)
    fed.fuse(RegMean(local=SETTINGS))
    fed.fuse(RegMean(local=SETTINGS, off_diagonal=0.1, fuse_biases=True))
    assert all(entry.from_journal for entry in fed.cohort.ledger.entries)


def test_fewer_samples_are_another_question_and_need_not_exist(federation: Any) -> None:
    fed = federation("mlp", width=8, depth=1, num_examples=(1, 30, 40))
    fed.fuse(RegMean(local=SETTINGS, num_samples=2))
    assert fed.upload("grams", "client_0").tensor("grams/1")[-1] == 1
    whole = fed.upload("grams", "client_1").tensor("grams/1")
    fed.fuse(RegMean(local=SETTINGS))
    assert not fed.upload("grams", "client_1").tensor("grams/1").equal(whole)


def test_a_client_that_leaves_between_the_exchanges_does_not_count(federation: Any) -> None:
    fed = federation("mlp", width=8, depth=1, absent=[("grams", "client_2")], quorum=0.6)
    fused = fed.fuse(RegMean(local=SETTINGS)).model.state
    pair = federation("mlp", num_clients=2, width=8, depth=1)
    for name, tensor in pair.fuse(RegMean(local=SETTINGS)).model.state.items():
        torch.testing.assert_close(fused[name], tensor)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError) as caught:
        RegMean(off_diagonal=1.5)
    assert str(caught.value) == ("off_diagonal is 1.5\n  where: method.off_diagonal\n  fix:   give a number in [0, 1]")
    with pytest.raises(ConfigError) as caught:
        RegMean(num_samples=0)
    assert str(caught.value) == "num_samples is 0\n  where: method.num_samples\n  fix:   give at least 1"


def test_different_models_are_refused(federation: Any) -> None:
    fed = federation(width=4, depth=2, client_models={"client_1": ("mlp", {"width": 4})})
    with pytest.raises(ConfigError, match="weights of different architectures cannot be averaged"):
        fed.fuse(RegMean(local=SETTINGS))


def test_a_transformer(federation: Any) -> None:
    fed = federation("vit", width=16, depth=1, heads=2, patch_size=4)
    method = replace(RegMean(local=SETTINGS), num_samples=16)
    assert evaluate(fed.fuse(method).model.module(), fed.test).accuracy > 0.25


def test_on_digits() -> None:
    config = {
        "data": {"source": "digits", "partition": {"scheme": "dirichlet", "num_clients": 3, "dirichlet_alpha": 0.3}},
        "model": {"family": "mlp", "width": 32, "depth": 1},
        "method": {"name": "regmean", "local": {"num_epochs": 10}},
        "runtime": {"name": "local", "workers": 1},
        "server": {"threads": 1},
    }
    accuracy = fedfuse.run(config).accuracy
    assert accuracy is not None
    assert accuracy > 0.6
