"""An adaptive server, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fedfuse
from fedfuse.core.errors import ConfigError
from fedfuse.methods.fedadam import FedAdam
from fedfuse.methods.fedavg import FedAvg
from fedfuse.methods.rounds import AdaptiveServer
from fedfuse.ops.adaptive import AdaptiveStep
from fedfuse.training import LocalSGD

SETTINGS = LocalSGD(num_epochs=2, batch_size=16)

DIGITS: dict[str, Any] = {
    "seed": 1,
    "data": {"source": "digits", "limit": 400, "test_limit": 200, "partition": {"scheme": "iid", "num_clients": 3}},
    "model": {"family": "mlp", "width": 32, "depth": 1},
    "runtime": {"name": "local", "workers": 1},
}


def test_the_first_step_by_hand_and_buffers_are_averaged(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    plain = fed.fuse(FedAvg(local=SETTINGS)).model.state
    fused = fed.fuse(FedAdam(local=SETTINGS, num_rounds=1, server_learning_rate=0.5, adaptivity=0.1)).model.state
    assert fed.cohort.ledger.exchanges() == ["local_models"]
    assert all(entry.from_journal for entry in fed.cohort.ledger.entries)
    names = [name for name, _ in fed.spec.build().named_parameters()]
    for name, start in fed.spec.build().named_parameters():
        change = (plain[name] - start.detach()).double()
        second = 0.99 * 0.1**2 + 0.01 * change.square()
        wanted = start.detach().double() + 0.5 * 0.1 * change / (second.sqrt() + 0.1)
        torch.testing.assert_close(fused[name].double(), wanted, rtol=1e-5, atol=1e-6)
    for name in set(plain) - set(names):
        assert torch.equal(fused[name], plain[name])


def test_where_nothing_adapts_it_is_fedavg(federation: Any) -> None:
    # v stays at tau squared when tau is huge, so the step is eta D / (2 tau); with eta = 2 tau that is D.
    flat = FedAdam(
        local=SETTINGS,
        num_rounds=2,
        optimizer="adagrad",
        first_decay=0.0,
        adaptivity=1e4,
        server_learning_rate=2e4,
    )
    fed = federation(width=4, depth=2)
    plain = fed.fuse(FedAvg(local=SETTINGS, num_rounds=2)).model.state
    for name, tensor in fed.fuse(flat).model.state.items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-4, atol=1e-5)


def test_momentum_carries_over_to_the_second_round(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=1)
    fused = fed.fuse(FedAdam(local=SETTINGS, num_rounds=2)).model.state
    sent = fed.message("round_1", "client_0").group("model")
    counts = {c: len(d.train) for c, d in fed.data.items()}

    def mean(exchange: str, name: str) -> torch.Tensor:
        parts = [n * fed.upload(exchange, c).tensor(f"model/{name}").double() for c, n in counts.items()]
        return torch.stack(parts).sum(0) / sum(counts.values())

    for name, p in fed.spec.build().named_parameters():
        first, second = mean("round_0", name) - p.detach().double(), mean("round_1", name) - sent[name].double()
        m = 0.9 * 0.1 * first + 0.1 * second
        v = 0.99 * (0.99 * 1e-6 + 0.01 * first.square()) + 0.01 * second.square()
        wanted = sent[name].double() + 0.03 * m / (v.sqrt() + 1e-3)
        torch.testing.assert_close(fused[name].double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{}, {"optimizer": "yogi"}, {"optimizer": "adagrad", "server_learning_rate": 0.1, "first_decay": 0.0}],
)
def test_every_optimiser_learns_digits(settings: dict[str, Any]) -> None:
    local = {"num_epochs": 10, "batch_size": 16, "learning_rate": 0.05}
    result = fedfuse.run({**DIGITS, "method": {"name": "fedadam", "num_rounds": 5, "local": local, **settings}})
    assert result.accuracy is not None
    assert result.accuracy > 0.8


def test_moments_go_on_from_step_to_step_and_dtypes_stay() -> None:
    step = AdaptiveStep(kind="adam", learning_rate=1.0, first_decay=0.5, second_decay=0.0, floor=0.5)
    server = AdaptiveServer(step, initial_second=0.25)
    start = {"w": torch.zeros(1), "b": torch.zeros(1, dtype=torch.bfloat16)}
    mean = {"w": torch.ones(1), "b": torch.zeros(1, dtype=torch.bfloat16)}
    once = server.advance(start, mean)
    # m = 0.5, v = 1 (no memory): 0.5 / 1.5; then m = 0.75, the change again 1.
    assert once["w"].item() == pytest.approx(1 / 3)
    twice = server.advance(once, {**mean, "w": once["w"] + 1})
    assert twice["w"].item() == pytest.approx(1 / 3 + 0.75 / 1.5)
    assert once["b"].dtype == torch.bfloat16
    assert once["b"].item() == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"server_learning_rate": 0.0},
            "server_learning_rate is 0.0\n  where: method.server_learning_rate\n  fix:   give a number above 0",
        ),
        ({"adaptivity": -1.0}, "adaptivity is -1.0\n  where: method.adaptivity\n  fix:   give a number above 0"),
        ({"first_decay": 1.0}, "first_decay is 1.0\n  where: method.first_decay\n  fix:   give a number in [0, 1)"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FedAdam(**settings)
    assert str(caught.value) == message
