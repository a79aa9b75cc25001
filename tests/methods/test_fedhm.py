"""Weaker clients train a thin form of the largest model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedfuse.core.errors import ConfigError
from fedfuse.methods.fedavg import FedAvg
from fedfuse.methods.fedhm import FedHM
from fedfuse.methods.sizes import num_values
from fedfuse.models.low_rank import Thin
from fedfuse.training import LocalSGD, predict

SETTINGS = LocalSGD(num_epochs=2, batch_size=16)
SIZES = {"client_0": ("mlp", {"width": 4, "depth": 3}), "client_1": ("mlp", {"width": 15, "depth": 3})}
LARGE = {"width": 16, "depth": 3}


def test_a_form_is_no_larger_than_the_model_that_its_client_owns(federation: Any) -> None:
    fed = federation("mlp", client_models=SIZES, **LARGE)
    fused = fed.fuse(FedHM(local=SETTINGS))
    sizes = {c: num_values(fed.job.model_of(c)) for c in fused.personal}
    held = {c: sum(p.numel() for p in a.module().parameters()) for c, a in fused.personal.items()}
    assert sizes["client_2"] == held["client_2"]
    assert held["client_1"] <= sizes["client_1"] < sizes["client_2"]
    # The first layer of 64 x 16 stays whole, so this client's form is as thin as can be, and larger than its model.
    assert set(fed.job.facts["ranks"]["client_0"].values()) == {1}
    assert held["client_0"] > sizes["client_0"]
    assert fed.job.facts["notes"] == [
        "a client's own model is smaller than the thinnest form of the largest, which it was given"
    ]
    # 1,140 numbers are in whole layers and biases; 1,519 allow rank 5 of two layers of 16 x 16.
    assert fed.job.facts["ranks"]["client_1"] == {"3": 5, "5": 5}
    assert fed.job.facts["ranks"]["client_2"] == {}
    assert all(predict(a.module(), fed.test.x).shape == (60, 4) for a in fused.personal.values())


def test_products_are_averaged_not_factors(federation: Any) -> None:
    fed = federation("mlp", client_models=SIZES, **LARGE)
    fused = fed.fuse(FedHM(local=SETTINGS))
    forms = {c: Thin.of(fed.spec, num_values(fed.job.model_of(c))) for c in fused.personal}
    uploads = {c: fed.upload("round_0", c).group("model") for c in fused.personal}
    counts = {"client_0": 24, "client_1": 32, "client_2": 40}
    # The client with the whole model ends up with the mean itself.
    for name, tensor in fused.personal["client_2"].state.items():
        mean = sum(n * forms[c].composed(name, uploads[c]).double() for c, n in counts.items()) / 96
        assert torch.allclose(tensor, torch.as_tensor(mean).float(), atol=1e-5)


def test_who_trains_the_large_model_as_it_is_needs_no_first_weights(federation: Any) -> None:
    fed = federation("mlp", client_models=SIZES, **LARGE)
    fed.fuse(FedHM(local=SETTINGS, num_rounds=2))
    assert not fed.message("round_0", "client_2").group("model")
    sent = fed.message("round_0", "client_0").group("model")
    assert sent["3.0.weight"].shape == (1, 16)
    assert sent["3.1.weight"].shape == (16, 1)
    assert fed.message("round_1", "client_2").group("model")["3.weight"].shape == (16, 16)


@pytest.mark.parametrize("num_rounds", [1, 2])
def test_with_equal_models_it_is_fedavg(federation: Any, num_rounds: int) -> None:
    fed = federation(width=4, depth=2)
    wanted = fed.fuse(FedAvg(local=SETTINGS, num_rounds=num_rounds)).model
    found = fed.fuse(FedHM(local=SETTINGS, num_rounds=num_rounds)).model
    assert all(torch.equal(found.state[name], wanted.state[name]) for name in wanted.state)


def test_the_decay_of_products_shrinks_them(federation: Any) -> None:
    energies = []
    for decay in (0.0, 1.0):
        fed = federation("mlp", client_models=SIZES, **LARGE)
        fed.fuse(FedHM(local=SETTINGS, frobenius_decay=decay))
        upload = fed.upload("round_0", "client_0").group("model")
        energies.append(float((upload["3.1.weight"] @ upload["3.0.weight"]).square().sum()))
    assert energies[1] < energies[0]
    with pytest.raises(ConfigError, match="frobenius_decay is -1"):
        FedHM(frobenius_decay=-1)
