"""Matched averaging: permutations are found, then the mean is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fedfuse
from fedfuse.core.errors import ConfigError
from fedfuse.methods.fedavg import FedAvg
from fedfuse.methods.fedma import FedMA, match
from fedfuse.models import spec
from fedfuse.models.permuting import Channels, channels_of, find_channels, permute
from fedfuse.training import LocalSGD

SETTINGS = LocalSGD(num_epochs=2, batch_size=16)
FAMILIES = [
    ("mlp", {"width": 12, "depth": 3}),
    ("cnn", {"width": 8, "depth": 4, "norm": "batch"}),
    ("cnn", {"width": 16, "depth": 2, "norm": "group"}),
    ("resnet", {"width": 4, "depth": 18}),
]


def noisy(state: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: t + 0.1 * torch.rand(t.shape, generator=generator) if t.is_floating_point() else t for n, t in state.items()
    }


def scrambled(state: dict[str, Tensor], channels: Channels, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for group in channels.groups:
        per_block = group.size // group.num_blocks
        starts = torch.randperm(group.num_blocks, generator=generator) * per_block
        order = torch.cat([start + torch.randperm(per_block, generator=generator) for start in starts])
        state = permute(state, group, order)
    return state


def spread(states: list[dict[str, Tensor]], weights: list[float]) -> float:
    shares = torch.tensor(weights).double() / sum(weights)
    total = 0.0
    for name in states[0]:
        stack = torch.stack([state[name].double() for state in states]).flatten(1)
        total += float(shares @ (stack - shares @ stack).square().sum(1))
    return total


@pytest.mark.parametrize(("family", "kind"), FAMILIES)
def test_permuted_copies_are_put_back_exactly(family: str, kind: dict[str, Any]) -> None:
    model = spec(family, kind, input_shape=(3, 8, 8), num_classes=4, seed=2)
    channels, state = channels_of(model), noisy(model.build().state_dict())
    copies = [scrambled(state, channels, 1), state, scrambled(state, channels, 2)]
    assert any(not torch.equal(copies[0][name], tensor) for name, tensor in state.items())
    # The largest weight stays where it is.
    for found in match(copies, [1.0, 5.0, 2.0], channels, 0, len(channels.groups), 3):
        for name, tensor in state.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_two_neurons_by_hand() -> None:
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
    channels = find_channels(net, torch.zeros(1, 1))
    a = {"0.weight": torch.tensor([[0.0], [10.0]]), "1.weight": torch.tensor([[1.0, 2.0]])}
    b = {"0.weight": torch.tensor([[9.0], [1.0]]), "1.weight": torch.tensor([[2.0, 1.0]])}
    first, second = match([a, b], [2.0, 1.0], channels, 0, 1, 5)
    assert first["0.weight"].tolist() == [[0], [10]]
    assert second["0.weight"].tolist() == [[1], [9]]
    assert second["1.weight"].tolist() == [[1, 2]]


def test_sweeps_see_the_weights_behind_the_neurons_too() -> None:
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
    channels = find_channels(net, torch.zeros(1, 1))
    # By incoming weights alone the order stays (0.5 < 0.6); by both it changes.
    a = {"0.weight": torch.tensor([[0.0], [1.0]]), "1.weight": torch.tensor([[0.0, 9.0]])}
    b = {"0.weight": torch.tensor([[0.4], [0.6]]), "1.weight": torch.tensor([[9.0, 0.0]])}
    assert match([a, b], [2.0, 1.0], channels, 0, 1, 0)[1]["1.weight"].tolist() == [[9, 0]]
    assert match([a, b], [2.0, 1.0], channels, 0, 1, 1)[1]["1.weight"].tolist() == [[0, 9]]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4), st.lists(st.integers(1, 50), min_size=4, max_size=4))
def test_matching_never_spreads_the_models(seed: int, num_models: int, sizes: list[int]) -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    channels = find_channels(net, torch.zeros(1, 3))
    states = [noisy(dict(net.state_dict()), seed + k) for k in range(num_models)]
    states = [{n: 10 * (t - net.state_dict()[n]) for n, t in state.items()} for state in states]
    weights = [float(n) for n in sizes[:num_models]]
    matched = match(states, weights, channels, 0, 2, 10)
    assert spread(matched, weights) <= spread(states, weights) * (1 + 1e-6)


def test_models_that_never_moved_apart_are_averaged_as_they_are(federation: Any) -> None:
    fed = federation(width=4, depth=2, identical=True, num_examples=(24,))
    fed.fuse(FedMA(local=SETTINGS))
    plain = fed.fuse(FedAvg(local=SETTINGS))
    matched = fed.fuse(FedMA(local=SETTINGS))
    torch.testing.assert_close(dict(matched.model.state), dict(plain.model.state), rtol=0, atol=0)


def test_the_head_by_class_weighs_each_class_by_its_examples(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=1)
    result = fed.fuse(FedMA(local=SETTINGS, head_weights="class")).model.state
    plain = fed.fuse(FedMA(local=SETTINGS)).model.state
    states = [fed.upload("local_models", c).group("model") for c in fed.data]
    counts = torch.stack([fed.upload("local_models", c).tensor("label_counts") for c in fed.data]).double()
    channels = channels_of(fed.spec)
    matched = match(states, counts.sum(1).tolist(), channels, 0, 1, 10)
    for row in range(4):
        shares = (counts[:, row] / counts[:, row].sum()).float()
        wanted = sum(share * state["3.weight"][row] for share, state in zip(shares, matched, strict=True))
        torch.testing.assert_close(result["3.weight"][row], wanted)
    torch.testing.assert_close(result["1.weight"], plain["1.weight"], rtol=0, atol=0)


def test_a_class_that_nobody_has_is_averaged_as_all_others(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=1)
    for data in fed.data.values():
        data.train.y.clamp_(max=2)
    by_class = fed.fuse(FedMA(local=SETTINGS, head_weights="class")).model.state
    plain = fed.fuse(FedMA(local=SETTINGS)).model.state
    torch.testing.assert_close(by_class["3.weight"][3], plain["3.weight"][3])
    assert not torch.equal(by_class["3.weight"][0], plain["3.weight"][0])


@pytest.mark.parametrize("first_weights", ["common", "own"])
def test_layers_are_fused_one_after_another(federation: Any, first_weights: Any) -> None:
    fed = federation(width=4, depth=2, quorum=0.5, absent={("layers_2", "client_1")})
    method = FedMA(local=LocalSGD(num_epochs=5, batch_size=16), num_exchanges=3, first_weights=first_weights)
    result = fed.fuse(method)
    first = "layers_0" if first_weights == "common" else "own_models"
    assert fed.cohort.ledger.exchanges() == [first, "layers_1", "layers_2"]
    # Two hidden layers and the head: after each exchange one layer is settled, with its normalisation.
    layers = [{"0.weight"}, {"3.weight"}]
    lower = [{"0", "1"}, {"0", "1", "3", "4"}]
    for number, settled in enumerate(lower, 1):
        sent = fed.message(f"layers_{number}", "client_0")
        assert {name.split(".")[0] for name in sent.group("fused")} == settled
        assert layers[number - 1] <= set(sent.group("fused"))
        uploaded = fed.upload(f"layers_{number}", "client_0").group("model")
        assert set(uploaded) == set(sent.group("own"))
        assert any(not torch.equal(tensor, uploaded[name]) for name, tensor in sent.group("own").items())
        other = fed.message(f"layers_{number}", "client_2")
        torch.testing.assert_close(other.group("fused"), sent.group("fused"), rtol=0, atol=0)
    assert [fed.message(f"layers_{k}", "client_0").number("num_epochs") for k in (1, 2)] == [2, 1]
    for name, tensor in fed.message("layers_2", "client_0").group("fused").items():
        torch.testing.assert_close(result.model.state[name], tensor, rtol=0, atol=0)
    # Who left is not part of the last layers: 24 and 40 examples.
    heads = [fed.upload("layers_2", c).tensor("model/9.bias") for c in ("client_0", "client_2")]
    torch.testing.assert_close(result.model.state["9.bias"], (24 * heads[0] + 40 * heads[1]) / 64)


def test_residual_networks_are_fused_in_parts(federation: Any) -> None:
    fed = federation("resnet", width=4, depth=18, num_examples=(8,))
    result = fed.fuse(FedMA(local=SETTINGS, num_exchanges=2))
    assert result.model.module()(fed.test.x).isfinite().all()
    fused = fed.message("layers_1", "client_0").group("fused")
    # 12 groups and the head make 13 layers; 6 groups come first.
    assert "3.body.0.weight" in fused
    assert "13.weight" not in fused


def test_more_exchanges_than_layers_are_refused_before_anybody_trains(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=2)
    with pytest.raises(ConfigError) as caught:
        fed.fuse(FedMA(local=LocalSGD(num_epochs=8), num_exchanges=4))
    assert str(caught.value) == (
        "3 layers cannot be fused in 4 exchanges\n  where: method.num_exchanges\n  fix:   give at most 3"
    )
    assert fed.cohort.ledger.exchanges() == []


@pytest.mark.parametrize(("name", "least"), [("num_exchanges", 1), ("num_sweeps", 0)])
def test_counts_that_cannot_be_are_refused(name: str, least: int) -> None:
    with pytest.raises(ConfigError) as caught:
        FedMA(**{name: least - 1})
    assert str(caught.value) == f"{name} is {least - 1}\n  where: method.{name}\n  fix:   give at least {least}"


def test_different_models_are_refused_before_anybody_trains(federation: Any) -> None:
    fed = federation("cnn", width=4, depth=2, client_models={"client_1": ("mlp", {})})
    with pytest.raises(ConfigError, match="weights of different architectures cannot be averaged"):
        fed.fuse(FedMA(local=SETTINGS))
    assert fed.cohort.ledger.exchanges() == []


def test_a_client_with_one_example_and_a_missing_client_do_no_harm(federation: Any) -> None:
    fed = federation(
        "cnn", width=4, depth=2, num_examples=(1, 30, 20), absent={("local_models", "client_2")}, quorum=0.5
    )
    result = fed.fuse(FedMA(local=SETTINGS, head_weights="class"))
    assert result.model.module()(fed.test.x).isfinite().all()


def test_digits_end_to_end() -> None:
    config = {
        "data": {"source": "digits", "limit": 600, "partition": {"scheme": "iid", "num_clients": 2}},
        "model": {"family": "mlp", "width": 32, "depth": 1},
        "method": {
            "name": "fedma",
            "first_weights": "own",
            "local": {"num_epochs": 30, "batch_size": 16, "learning_rate": 0.05},
        },
        "runtime": {"name": "local", "workers": 1},
    }
    accuracy = fedfuse.run(config).accuracy
    assert accuracy is not None
    assert accuracy > 0.8
