"""Normalised averaging against its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fedfuse
from fedfuse.core.errors import ConfigError
from fedfuse.methods.fedavg import FedAvg
from fedfuse.methods.fednova import FedNova
from fedfuse.training import LocalSGD

DIGITS: dict[str, Any] = {
    "seed": 1,
    "data": {"source": "digits", "limit": 400, "test_limit": 200, "partition": {"scheme": "iid", "num_clients": 3}},
    "model": {"family": "mlp", "width": 32, "depth": 1},
    "runtime": {"name": "local", "workers": 1},
}

SETTINGS = LocalSGD(num_epochs=2, batch_size=16)


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("settings", [{"num_clients": 1}, {"num_examples": (32, 32, 32)}])
def test_clients_with_equal_steps_give_fedavg(federation: Any, settings: dict[str, Any]) -> None:
    fed = federation(width=4, depth=2, **settings)
    plain = fed.fuse(FedAvg(local=SETTINGS, num_rounds=2))
    fused = fed.fuse(FedNova(local=SETTINGS, num_rounds=2))
    same(fused.model.state, plain.model.state)
    assert all(entry.from_journal for entry in fed.cohort.ledger.entries if entry.exchange == "round_0")


def test_unequal_steps_by_hand(federation: Any) -> None:
    # 24, 32 and 40 examples in batches of 16, one epoch, no momentum: 2, 2 and 3 steps.
    local = LocalSGD(num_epochs=2, batch_size=16, momentum=0.0, learning_rate=0.05)
    fed = federation(width=4, depth=2)
    fused = fed.fuse(FedNova(local=local, num_rounds=2))
    sent = fed.message("round_1", "client_0").group("model")
    uploads = {c: fed.upload("round_1", c).group("model") for c in fed.cohort.client_ids}
    shares, steps = [24 / 96, 32 / 96, 40 / 96], [2, 2, 3]
    effective = sum(p * t for p, t in zip(shares, steps, strict=True))
    for name, _ in fed.spec.build().named_parameters():
        start = sent[name].double()
        rates = [(start - u[name].double()) / t for u, t in zip(uploads.values(), steps, strict=True)]
        wanted = start - effective * sum(p * r for p, r in zip(shares, rates, strict=True))
        torch.testing.assert_close(fused.model.state[name].double(), wanted, rtol=1e-5, atol=1e-6)
    means = [p * u["1.running_mean"].double() for p, u in zip(shares, uploads.values(), strict=True)]
    torch.testing.assert_close(fused.model.state["1.running_mean"].double(), sum(means), rtol=1e-5, atol=1e-6)


def test_one_round_asks_the_question_that_every_method_asks(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fed.fuse(FedNova(local=SETTINGS, num_rounds=1))
    assert fed.cohort.ledger.exchanges() == ["local_models"]


def test_momentum_and_a_falling_rate_enter_the_length_of_the_path() -> None:
    local = LocalSGD(num_epochs=2, batch_size=8, momentum=0.5, learning_rate=1.0)
    # 16 examples, one epoch: two steps; (1 + 0.5) + 1.
    assert FedNova(local=local, num_rounds=2).path_length(16, 0) == pytest.approx(2.5)
    falling = LocalSGD(num_epochs=1, batch_size=8, momentum=0.0, learning_rate=1.0, schedule="cosine")
    assert FedNova(local=falling, num_rounds=1).path_length(16, 0) == pytest.approx(1.5)


def test_early_stopping_and_clients_of_different_models_are_refused(federation: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        FedNova(local=LocalSGD(patience=2))
    assert str(caught.value) == (
        "fednova divides by the number of local steps, which early stopping hides\n"
        "  where: method.local.patience\n"
        "  fix:   leave patience out"
    )
    fed = federation(width=4, depth=2, client_models={"client_1": ("cnn", {"width": 6, "depth": 2})})
    with pytest.raises(ConfigError, match="weights of different architectures cannot be averaged"):
        fed.fuse(FedNova(local=SETTINGS, num_rounds=2))
    assert fed.cohort.ledger.exchanges() == []


def test_it_learns_digits() -> None:
    local = {"num_epochs": 10, "batch_size": 16, "learning_rate": 0.05}
    result = fedfuse.run({**DIGITS, "method": {"name": "fednova", "num_rounds": 5, "local": local}})
    assert result.accuracy is not None
    assert result.accuracy > 0.8
