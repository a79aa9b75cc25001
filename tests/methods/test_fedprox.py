"""Federated averaging with a proximal term."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fedfuse.core.errors import ConfigError
from fedfuse.methods.fedavg import FedAvg
from fedfuse.methods.fedprox import FedProx
from fedfuse.training import LocalSGD

SETTINGS = LocalSGD(num_epochs=2, batch_size=16)


def test_without_a_proximal_weight_the_rounds_are_those_of_fedavg(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    free = fed.fuse(FedAvg(local=SETTINGS, num_rounds=2))
    held = fed.fuse(FedProx(local=SETTINGS, num_rounds=2, proximal_weight=0.0))
    assert fed.cohort.ledger.exchanges() == ["round_0", "round_1"]
    assert not any(entry.from_journal for entry in fed.cohort.ledger.entries)
    for name, tensor in free.model.state.items():
        torch.testing.assert_close(held.model.state[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("proximal_weight", [0.5, 10.0])
def test_two_steps_in_closed_form(federation: Any, proximal_weight: float) -> None:
    # p1 = a - r g(a): the pull is zero at the start. p2 = p1 - r (g(p1) + mu (p1 - a)).
    rate = 0.1
    whole_batch = LocalSGD(num_epochs=2, batch_size=64, learning_rate=rate, momentum=0.0)
    fed = federation("mlp", width=4, depth=1)
    fed.fuse(FedProx(local=whole_batch, proximal_weight=proximal_weight))
    module, data = fed.spec.build(), fed.data["client_0"].train
    start = [p.detach().clone() for p in module.parameters()]
    for _ in range(2):
        gradients = torch.autograd.grad(F.cross_entropy(module(data.x), data.y), list(module.parameters()))
        with torch.no_grad():
            for p, gradient, anchor in zip(module.parameters(), gradients, start, strict=True):
                p -= rate * (gradient + proximal_weight * (p - anchor))
    upload = fed.upload("round_0", "client_0")
    for name, p in module.named_parameters():
        torch.testing.assert_close(upload.tensor(f"model/{name}"), p.detach(), rtol=1e-5, atol=1e-6)


def test_the_pull_is_towards_what_was_sent_in_this_round(federation: Any) -> None:
    # With r mu = 1 the second step takes the first one back: p2 = a - r g(p1), wherever the round began.
    rate = 0.05
    whole_batch = LocalSGD(num_epochs=4, batch_size=64, learning_rate=rate, momentum=0.0)
    fed = federation("mlp", width=4, depth=1)
    fed.fuse(FedProx(local=whole_batch, num_rounds=2, proximal_weight=1 / rate))
    sent, module, data = fed.message("round_1", "client_1").group("model"), fed.spec.build(), fed.data["client_1"].train
    module.load_state_dict(sent)
    for _ in range(2):
        gradients = torch.autograd.grad(F.cross_entropy(module(data.x), data.y), list(module.parameters()))
        moved = {n: sent[n] - rate * g for (n, _), g in zip(module.named_parameters(), gradients, strict=True)}
        module.load_state_dict(moved)
    upload = fed.upload("round_1", "client_1").group("model")
    for name, tensor in moved.items():
        torch.testing.assert_close(upload[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_larger_weight_keeps_clients_nearer(federation: Any) -> None:
    distances = []
    fed = federation(width=4, depth=2)
    start = {name: p.detach() for name, p in fed.spec.build().named_parameters()}
    for proximal_weight in (0.0, 1.0, 20.0):
        fed.fuse(FedProx(local=SETTINGS, proximal_weight=proximal_weight))
        upload = fed.upload("round_0", "client_0")
        distances.append(sum(float((upload.tensor(f"model/{n}") - p).square().sum()) for n, p in start.items()))
    assert distances[0] > distances[1] > distances[2] > 0


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        FedProx(proximal_weight=-0.1)
    assert str(caught.value) == ("proximal_weight is -0.1\n  where: method.proximal_weight\n  fix:   give 0 or more")
    with pytest.raises(ConfigError, match="proximal_weight is nan"):
        FedProx(proximal_weight=float("nan"))


def test_a_round_count_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_rounds is 0"):
        FedProx(num_rounds=0)
