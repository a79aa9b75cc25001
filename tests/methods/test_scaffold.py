"""Control variates: stored, summed, and used as the paper says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import fedfuse
from fedfuse.core.errors import ConfigError
from fedfuse.methods.fedavg import FedAvg
from fedfuse.methods.scaffold import CommonVariate, Scaffold
from fedfuse.training import LocalSGD

DIGITS: dict[str, Any] = {
    "seed": 1,
    "data": {"source": "digits", "limit": 400, "test_limit": 200, "partition": {"scheme": "iid", "num_clients": 3}},
    "model": {"family": "mlp", "width": 32, "depth": 1},
    "runtime": {"name": "local", "workers": 1},
}

SETTINGS = LocalSGD(num_epochs=4, batch_size=16)
RATE = 0.1
ONE_STEP = LocalSGD(num_epochs=2, batch_size=64, learning_rate=RATE, momentum=0.0)


def gradients(fed: Any, client_id: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    module, data = fed.spec.build(), fed.data[client_id].train
    module.load_state_dict(state)
    found = torch.autograd.grad(F.cross_entropy(module(data.x), data.y), list(module.parameters()))
    return dict(zip(dict(module.named_parameters()), found, strict=True))


def test_the_first_round_is_fedavgs_and_one_client_stays_with_fedavg(federation: Any) -> None:
    fed = federation(width=4, depth=2, num_clients=1)
    plain = fed.fuse(FedAvg(local=SETTINGS, num_rounds=2)).model.state
    first = fed.upload("round_0", "client_0").group("model")
    fused = fed.fuse(Scaffold(local=SETTINGS, num_rounds=2)).model.state
    assert fed.cohort.ledger.exchanges() == ["round_0", "round_1"]
    for name, tensor in fed.upload("round_0", "client_0").group("model").items():
        assert torch.equal(tensor, first[name])
    # Its own variate is everybody's, so nothing is corrected.
    for name, tensor in plain.items():
        torch.testing.assert_close(fused[name], tensor, rtol=1e-5, atol=1e-6)


def test_after_one_full_step_a_variate_is_the_gradient_and_the_next_step_is_the_common_one(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=1)
    fused = fed.fuse(Scaffold(local=ONE_STEP, num_rounds=2)).model.state
    start = {name: p.detach() for name, p in fed.spec.build().named_parameters()}
    counts = {c: len(d.train) for c, d in fed.data.items()}
    own = {c: gradients(fed, c, start) for c in counts}
    sent = fed.message("round_1", "client_0")
    for name in start:
        common = sum(n * own[c][name] for c, n in counts.items()) / sum(counts.values())
        torch.testing.assert_close(sent.tensor(f"variate/{name}"), common, rtol=1e-4, atol=1e-5)
        for c in counts:
            kept = fed.kept(c)[0].tensor(f"variate/{name}")
            torch.testing.assert_close(kept, own[c][name], rtol=1e-4, atol=1e-5)
    # Second round, one step each: y = x - r (g_i(x) - c_i + c).
    middle = sent.group("model")
    steps = {c: gradients(fed, c, middle) for c in counts}
    for name in start:
        common = sent.tensor(f"variate/{name}")
        for c in counts:
            wanted = middle[name] - RATE * (steps[c][name] - own[c][name] + common)
            torch.testing.assert_close(fed.upload("round_1", c).tensor(f"model/{name}"), wanted, rtol=1e-4, atol=1e-5)
        mean = sum(n * fed.upload("round_1", c).tensor(f"model/{name}") for c, n in counts.items()) / 96
        torch.testing.assert_close(fused[name], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("local", [SETTINGS, LocalSGD(num_epochs=4, batch_size=16, schedule="cosine")])
def test_a_variate_is_the_weighted_mean_of_the_local_gradients(federation: Any, local: LocalSGD) -> None:
    # The corrected run moves by length * (mean gradient - c_i + c): the new variate takes that apart again.
    fed = federation(width=4, depth=2)
    fed.fuse(Scaffold(local=local, num_rounds=2))
    sent, upload = fed.message("round_1", "client_1"), fed.upload("round_1", "client_1")
    before, after = fed.kept("client_1")
    for name, _ in fed.spec.build().named_parameters():
        change = upload.tensor(f"variate/{name}")
        torch.testing.assert_close(after.tensor(f"variate/{name}"), before.tensor(f"variate/{name}") + change)
        moved = sent.tensor(f"model/{name}") - upload.tensor(f"model/{name}")
        pull = change + sent.tensor(f"variate/{name}")
        if float(pull.abs().max()) > 1e-6:
            length = float((moved * pull).sum() / pull.square().sum())
            torch.testing.assert_close(moved, length * pull, rtol=1e-3, atol=1e-6)


def test_the_servers_variate_is_the_mean_of_the_clients_also_after_one_was_away(federation: Any) -> None:
    fed = federation(width=4, depth=2, absent={("round_0", "client_1"), ("round_1", "client_0")}, quorum=0.5)
    fed.fuse(Scaffold(local=SETTINGS, num_rounds=3))
    sent = fed.message("round_2", "client_2").group("variate")
    # After the second round: client_0 has its first variate, client_1 its first, client_2 its second.
    kept = {
        "client_0": fed.kept("client_0")[0],
        "client_1": fed.kept("client_1")[0],
        "client_2": fed.kept("client_2")[1],
    }
    for name, tensor in sent.items():
        total = sum(len(fed.data[c].train) * state.tensor(f"variate/{name}") for c, state in kept.items())
        torch.testing.assert_close(tensor, total / 96, rtol=1e-4, atol=1e-6)


def test_the_common_variate_by_hand() -> None:
    variate = CommonVariate({"w": torch.zeros(1)})
    assert variate.mean()["w"].tolist() == [0.0]
    variate.add({"a": 1, "b": 3}, {"w": torch.tensor([2.0])})
    assert variate.mean()["w"].tolist() == [2.0]
    # A third client, heard for the first time, with a variate of 6 and as many examples as the others together.
    variate.add({"c": 4}, {"w": torch.tensor([6.0])})
    assert variate.mean()["w"].tolist() == [4.0]


def test_a_server_rate_goes_beyond_the_mean(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=1)
    once = fed.fuse(Scaffold(local=SETTINGS, num_rounds=1)).model.state
    twice = fed.fuse(Scaffold(local=SETTINGS, num_rounds=1, server_learning_rate=2.0)).model.state
    for name, start in fed.spec.build().named_parameters():
        torch.testing.assert_close(twice[name], 2 * once[name] - start.detach(), rtol=1e-4, atol=1e-5)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="scaffold divides by the number of local steps"):
        Scaffold(local=LocalSGD(patience=1))
    with pytest.raises(ConfigError) as caught:
        Scaffold(server_learning_rate=0.0)
    assert str(caught.value) == (
        "server_learning_rate is 0.0\n  where: method.server_learning_rate\n  fix:   give a number above 0"
    )
    with pytest.raises(ConfigError, match="20 local epochs cannot be divided over 30 exchanges"):
        Scaffold(num_rounds=30)


def test_it_learns_digits() -> None:
    local = {"num_epochs": 10, "batch_size": 16, "learning_rate": 0.05}
    result = fedfuse.run({**DIGITS, "method": {"name": "scaffold", "num_rounds": 5, "local": local}})
    assert result.accuracy is not None
    assert result.accuracy > 0.8
