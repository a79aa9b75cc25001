"""Fusion by Fisher information."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import fedfuse
from fedfuse.core.errors import ConfigError
from fedfuse.methods.fedavg import FedAvg
from fedfuse.methods.fedfisher import FedFisher
from fedfuse.training import LocalSGD, evaluate

SETTINGS = LocalSGD(num_epochs=3, batch_size=16)
LOGISTIC = {"width": 8, "depth": 0, "input_shape": (6,)}


def logistic(fed: Any, client_id: str) -> tuple[Any, Any, Any]:
    """Inputs with a one, the model's probabilities, and the weights with the bias of a logistic regression."""
    state, data = fed.upload("local_models", client_id).group("model"), fed.data[client_id].train
    x = torch.cat([data.x, torch.ones(len(data), 1)], 1).double()
    weights = torch.cat([state["1.weight"], state["1.bias"][:, None]], 1).double()
    return x, (x @ weights.T).softmax(1), weights


def test_the_diagonal_of_a_logistic_regression_in_closed_form(federation: Any) -> None:
    # Of class c and input j: the mean of p_c (1 - p_c) x_j^2.
    fed = federation("mlp", **LOGISTIC)
    fused = fed.fuse(FedFisher(local=SETTINGS, fisher="diagonal", damping=0.0)).model.state
    values, fishers = [], []
    for client_id in fed.data:
        x, p, weights = logistic(fed, client_id)
        fisher = (p * (1 - p)).T @ x.square()
        found = fed.upload("fisher", client_id)
        torch.testing.assert_close(
            found.tensor("diagonal/1.weight").double(), fisher[:, :-1] / len(x), rtol=1e-4, atol=1e-7
        )
        torch.testing.assert_close(
            found.tensor("diagonal/1.bias").double(), fisher[:, -1] / len(x), rtol=1e-4, atol=1e-7
        )
        values.append(weights)
        fishers.append(fisher)
    total = torch.stack(fishers)
    wanted = (total * torch.stack(values)).sum(0) / total.sum(0)
    torch.testing.assert_close(fused["1.weight"].double(), wanted[:, :-1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fused["1.bias"].double(), wanted[:, -1], rtol=1e-4, atol=1e-6)


def test_the_factors_of_a_logistic_regression_in_closed_form(federation: Any) -> None:
    fed = federation("mlp", **LOGISTIC)
    fused = fed.fuse(FedFisher(local=SETTINGS, damping=0.1)).model.state
    systems, values, counts = [], [], []
    for client_id in fed.data:
        x, p, weights = logistic(fed, client_id)
        a, g = x.T @ x / len(x), (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0)
        systems.append((g, a))
        values.append(weights)
        counts.append(len(x))
    shares = torch.tensor(counts).double() / sum(counts)
    mean = torch.tensordot(shares, torch.stack(values), 1)
    size = mean.numel()
    pull = 0.1 * sum(float(s * g.trace() * a.trace()) / size for s, (g, a) in zip(shares, systems, strict=True))
    left = pull * torch.eye(size).double()
    right = pull * mean.flatten()
    for share, (g, a), value in zip(shares, systems, values, strict=True):
        left = left + share * torch.kron(g, a)
        right = right + share * torch.kron(g, a) @ value.flatten()
    wanted = torch.linalg.solve(left, right).reshape(mean.shape)
    torch.testing.assert_close(fused["1.weight"].double(), wanted[:, :-1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(fused["1.bias"].double(), wanted[:, -1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fisher", ["diagonal", "kfac"])
def test_a_huge_damping_gives_the_mean(federation: Any, fisher: Any) -> None:
    fed = federation(width=4, depth=2)
    found = fed.fuse(FedFisher(local=SETTINGS, fisher=fisher, damping=1e9)).model.state
    mean = fed.fuse(FedAvg(local=SETTINGS)).model.state
    for name, tensor in mean.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_what_crosses(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fed.fuse(FedFisher(local=SETTINGS))
    upload = fed.upload("fisher", "client_1")
    # Two convolutions on 9 and 36 inputs without bias, a head with one; BatchNorm's parameters have a diagonal.
    assert {key: tuple(upload.tensor(key).shape) for key in upload} == {
        "diagonal/1.bias": (4,),
        "diagonal/1.weight": (4,),
        "diagonal/4.bias": (4,),
        "diagonal/4.weight": (4,),
        "gradients/0": (10,),
        "gradients/3": (10,),
        "gradients/9": (10,),
        "inputs/0": (45,),
        "inputs/3": (666,),
        "inputs/9": (15,),
    }
    own = fed.upload("local_models", "client_1").group("model")
    assert all(fed.message("fisher", "client_1").group("model")[name].equal(t) for name, t in own.items())


@pytest.mark.parametrize("labels", ["all", "sampled", "true"])
def test_whose_labels(federation: Any, labels: Any) -> None:
    fed = federation("mlp", **LOGISTIC)
    fed.fuse(FedFisher(local=SETTINGS, labels=labels, fisher="diagonal"))
    _, p, _ = logistic(fed, "client_0")
    y = fed.data["client_0"].train.y
    found = fed.upload("fisher", "client_0").tensor("diagonal/1.bias").double()
    exact = (p * (1 - p)).mean(0)
    empirical = (p - F.one_hot(y, 4)).square().mean(0)
    assert torch.allclose(found, exact, rtol=1e-4) == (labels == "all")
    assert torch.allclose(found, empirical, rtol=1e-4) == (labels == "true")


def test_damping_asks_no_client_again(federation: Any) -> None:
    fed = federation("mlp", **LOGISTIC)
    fed.fuse(FedFisher(local=SETTINGS))
    fed.fuse(FedFisher(local=SETTINGS, damping=1.0))
    assert all(entry.from_journal for entry in fed.cohort.ledger.entries)


def test_a_client_with_one_example_and_one_that_leaves(federation: Any) -> None:
    fed = federation(
        width=4, depth=2, num_clients=3, num_examples=(1, 30, 40), absent=[("fisher", "client_2")], quorum=0.6
    )
    state = fed.fuse(FedFisher(local=SETTINGS, num_samples=16)).model.state
    assert all(bool(torch.isfinite(tensor.double()).all()) for tensor in state.values())


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError) as caught:
        FedFisher(damping=-1.0)
    assert str(caught.value) == "damping is -1.0\n  where: method.damping\n  fix:   give 0 or more"
    with pytest.raises(ConfigError, match="num_samples is 0"):
        FedFisher(num_samples=0)


def test_different_models_are_refused(federation: Any) -> None:
    fed = federation(width=4, depth=2, client_models={"client_1": ("mlp", {"width": 4})})
    with pytest.raises(ConfigError, match="weights of different architectures cannot be averaged"):
        fed.fuse(FedFisher(local=SETTINGS))


@pytest.mark.parametrize("fisher", ["diagonal", "kfac"])
def test_a_transformer(federation: Any, fisher: Any) -> None:
    fed = federation("vit", width=16, depth=1, heads=2, patch_size=4)
    fused = fed.fuse(FedFisher(local=SETTINGS, fisher=fisher, num_samples=16))
    assert evaluate(fused.model.module(), fed.test).accuracy > 0.25


def test_on_digits() -> None:
    config = {
        "data": {"source": "digits", "partition": {"scheme": "dirichlet", "num_clients": 3, "dirichlet_alpha": 0.3}},
        "model": {"family": "mlp", "width": 32, "depth": 1},
        "method": {"name": "fedfisher", "local": {"num_epochs": 10}, "num_samples": 200},
        "runtime": {"name": "local", "workers": 1},
        "server": {"threads": 1},
    }
    accuracy = fedfuse.run(config).accuracy
    assert accuracy is not None
    assert accuracy > 0.6
