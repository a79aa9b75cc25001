"""Federated averaging against its definition."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from fedfuse.core.artifact import ModelSpec, detached_state
from fedfuse.core.cohort import Replies
from fedfuse.core.errors import ConfigError
from fedfuse.core.journal import Entry
from fedfuse.core.method import Job
from fedfuse.core.payload import Payload
from fedfuse.core.seeding import Rng
from fedfuse.methods.fedavg import FedAvg, average
from fedfuse.training import LocalSGD, train

SETTINGS = LocalSGD(num_epochs=3, batch_size=16)


def mean_by_hand(fed: Any, exchange: str) -> dict[str, torch.Tensor]:
    uploads = [fed.upload(exchange, c) for c in fed.cohort.client_ids]
    counts = [len(data.train) for data in fed.data.values()]
    wanted = {}
    for name, first in uploads[0].group("model").items():
        total = sum(n * u.tensor(f"model/{name}").double() for n, u in zip(counts, uploads, strict=True))
        value = total / sum(counts)
        wanted[name] = value.to(first.dtype) if first.is_floating_point() else value.round().to(first.dtype)
    return wanted


def test_one_round_is_the_mean_weighted_by_examples_with_the_buffers_of_batchnorm(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fused = fed.fuse(FedAvg(local=SETTINGS))
    assert fed.cohort.ledger.exchanges() == ["local_models"]
    wanted = mean_by_hand(fed, "local_models")
    assert sorted(fused.model.state) == sorted(wanted)
    for name, tensor in wanted.items():
        assert fused.model.state[name].dtype == tensor.dtype
        torch.testing.assert_close(fused.model.state[name], tensor, rtol=1e-6, atol=1e-7)
    # 24, 32 and 40 examples in batches of 16 for 3 epochs: 6, 6 and 9 steps (a last batch of 8 counts).
    steps = [int(fed.upload("local_models", c).tensor("model/1.num_batches_tracked")) for c in fed.cohort.client_ids]
    assert steps == [6, 6, 9]
    assert int(fused.model.state["1.num_batches_tracked"]) == round((24 * 6 + 32 * 6 + 40 * 9) / 96)
    assert not torch.equal(fused.model.state["1.running_mean"], torch.zeros(4))


def test_every_round_starts_from_the_mean_of_the_last_and_epochs_are_shared_out(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fused = fed.fuse(FedAvg(local=SETTINGS, num_rounds=2))
    assert fed.cohort.ledger.exchanges() == ["round_0", "round_1"]
    first = mean_by_hand(fed, "round_0")
    message = fed.message("round_1", "client_0")
    assert [fed.message(f"round_{k}", "client_0")["num_epochs"] for k in (0, 1)] == [2, 1]
    assert not fed.message("round_0", "client_0").group("model")
    assert sorted(message.group("model")) == sorted(first)
    for name, tensor in first.items():
        torch.testing.assert_close(message.tensor(f"model/{name}"), tensor, rtol=1e-6, atol=1e-7)
    for name, tensor in mean_by_hand(fed, "round_1").items():
        torch.testing.assert_close(fused.model.state[name], tensor, rtol=1e-6, atol=1e-7)


def test_a_round_trains_from_what_was_sent(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fed.fuse(FedAvg(local=SETTINGS, num_rounds=2))
    module = fed.spec.build()
    module.load_state_dict(fed.message("round_1", "client_2").group("model"))
    rng = fed.rng("client_2", "round_1")
    train(module, fed.data["client_2"].train, SETTINGS, rng=rng, device=torch.device("cpu"), num_epochs=1)
    upload = fed.upload("round_1", "client_2").group("model")
    assert all(torch.equal(tensor, upload[name]) for name, tensor in detached_state(module).items())


def replies_of(states: list[dict[str, torch.Tensor]], counts: list[int]) -> Replies:
    entries = {}
    for position, (state, count) in enumerate(zip(states, counts, strict=True)):
        upload = Payload({"num_examples": count}).put_group("model", state)
        entries[f"client_{position}"] = Entry(str(position), {}, data=upload.encode())
    return Replies(entries, {})


def job() -> Job:
    spec = ModelSpec(recipe={"kind": "none"}, seed=0, input_shape=(1,), num_classes=2)
    return Job(model=spec, rng=Rng(0), device=torch.device("cpu"))


@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8),
    steps=st.integers(0, 2**40),
    counts=st.lists(st.integers(1, 10**6), min_size=1, max_size=7),
)
def test_identical_clients_give_that_model_bit_for_bit(values: list[float], steps: int, counts: list[int]) -> None:
    model = {
        "weight": torch.tensor(values),
        "half": torch.tensor(values).clamp(-1e30, 1e30).bfloat16(),
        "num_batches_tracked": torch.tensor(steps),
    }
    fused = average(replies_of([model] * len(counts), counts), job())
    for name, tensor in model.items():
        assert fused.state[name].dtype == tensor.dtype
        assert torch.equal(fused.state[name], tensor)


def test_ten_identical_clients_do_not_move_by_the_tenth_that_binary_lacks() -> None:
    model = {"weight": torch.tensor([1.0, 0.1, -3.3e-8])}
    assert torch.equal(average(replies_of([model] * 10, [7] * 10), job()).state["weight"], model["weight"])


def test_the_mean_by_hand() -> None:
    states = [{"w": torch.tensor([1.0, 10.0])}, {"w": torch.tensor([5.0, 20.0])}]
    assert average(replies_of(states, [3, 1]), job()).state["w"].tolist() == [2.0, 12.5]


def test_a_client_that_is_away_for_a_round_is_back_in_the_next(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=1, absent=[("round_0", "client_1")], quorum=0.6)
    fed.fuse(FedAvg(local=SETTINGS, num_rounds=2))
    answered = [(e.exchange, e.client) for e in fed.cohort.ledger.entries if e.upload_bytes]
    assert ("round_0", "client_1") not in answered
    assert ("round_1", "client_1") in answered


def test_weights_of_different_architectures_are_refused(federation: Any) -> None:
    fed = federation(client_models={"client_1": ("mlp", {"width": 5})}, width=4, depth=2)
    with pytest.raises(ConfigError) as caught:
        fed.fuse(FedAvg(local=SETTINGS))
    assert str(caught.value) == (
        "weights of different architectures cannot be averaged\n"
        "  where: model.clients\n"
        "  fix:   use a method for heterogeneous models, such as ensemble or fusefl"
    )
    assert fed.cohort.ledger.exchanges() == []


def test_no_round_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        FedAvg(num_rounds=0)
    assert str(caught.value) == "num_rounds is 0\n  where: method.num_rounds\n  fix:   give at least 1"


def test_more_rounds_than_epochs_are_refused(federation: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        federation("mlp", width=4, depth=1).fuse(FedAvg(local=SETTINGS, num_rounds=4))
    assert str(caught.value) == (
        "3 local epochs cannot be divided over 4 exchanges\n  where: method.local.num_epochs\n  fix:   give at least 4"
    )
