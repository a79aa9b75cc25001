"""CELLM: only the largest entries of a change cross, in both directions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_lora import LOCAL as LORA_LOCAL
from tiny_lora import lora_federation

from fedfuse.core.artifact import load_state
from fedfuse.core.errors import ConfigError, PayloadError
from fedfuse.core.payload import Payload
from fedfuse.methods.cellm import Cellm, put_sparse, read_sparse
from fedfuse.methods.changes import flat_parameters
from fedfuse.methods.fedavg import FedAvg
from fedfuse.methods.fedit import FedIT
from fedfuse.training import LocalSGD, evaluate

LOCAL = LocalSGD(num_epochs=2, batch_size=16)


def method(**settings: Any) -> Cellm:
    return Cellm(**{"local": LOCAL, "num_rounds": 2, **settings})


def flat(fed: Any, state: Any) -> torch.Tensor:
    module = fed.spec.build()
    load_state(module, state)
    return flat_parameters(module).double()


def test_the_largest_entries_of_all_weights_together_are_written() -> None:
    change = torch.tensor([0.0, -3.0, 1.0, 2.0, 0.5, 0.0, 0.0, 0.25])
    payload = put_sparse(Payload(), "change", change, 0.25)

    assert payload.tensor("change/values").tolist() == [-3.0, 2.0]
    assert payload.tensor("change/mask").tolist() == [0b0000_1010]
    assert read_sparse(payload, "change", 8).tolist() == [0.0, -3.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0]


def test_all_entries_give_fedavg(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    plain = fed.fuse(FedAvg(local=LOCAL, num_rounds=2))
    fused = fed.fuse(method(upload_density=1.0, download_density=1.0))

    for name, tensor in plain.model.state.items():
        torch.testing.assert_close(fused.model.state[name], tensor, rtol=1e-5, atol=1e-5)


def test_the_server_keeps_what_it_does_not_send(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fused = fed.fuse(method(upload_density=0.1, download_density=0.02))

    start = flat_parameters(fed.spec.build()).double()
    means = [
        sum(
            n / 96 * read_sparse(fed.upload(f"round_{r}", f"client_{c}"), "change", len(start))
            for c, n in enumerate((24, 32, 40))
        )
        for r in (0, 1)
    ]
    sent = read_sparse(fed.message("round_1", "client_1"), "total", len(start))
    assert int(sent.count_nonzero()) == -(-len(start) * 2 // 100)
    assert bool((sent[sent != 0] == means[0][sent != 0].float().double()).all())
    assert means[0][sent == 0].abs().max() <= sent[sent != 0].abs().min()
    torch.testing.assert_close(flat(fed, fused.model.state), start + means[0] + means[1], rtol=1e-6, atol=1e-6)


def test_a_tenth_of_the_bytes_of_an_adapter(federation: Any) -> None:
    dense = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    sparse = len(put_sparse(Payload(), "change", dense, Cellm().upload_density).encode())
    whole = len(Payload({"model/adapter": dense}).encode())
    assert 12 < whole / sparse < 12.5

    fed = lora_federation(federation, rank=4)
    fed.fuse(FedIT(local=LORA_LOCAL))
    whole = max(fed.runtime.upload_bytes.values())
    fed.runtime.upload_bytes.clear()
    fed.fuse(method(local=LORA_LOCAL))
    assert max(fed.runtime.upload_bytes.values()) < whole / 2  # names weigh as much as so small an adapter


def test_it_learns_from_a_twentieth_of_the_changes(federation: Any) -> None:
    fed = federation("mlp", width=16, depth=1)
    local = LocalSGD(num_epochs=12, batch_size=16, learning_rate=0.05)
    fused = fed.fuse(method(local=local, num_rounds=6))

    assert evaluate(fused.model.module(), fed.test).accuracy > 0.7


@pytest.mark.parametrize("name", ["upload_density", "download_density"])
@pytest.mark.parametrize("value", [0.0, 1.5])
def test_a_wrong_density_is_told(name: str, value: float) -> None:
    with pytest.raises(ConfigError) as caught:
        method(**{name: value})
    assert str(caught.value) == (
        f"{name} is {value:g}\n  where: method.{name}\n  fix:   give a number above 0, at most 1"
    )


def test_rounds_that_cannot_be_are_told() -> None:
    with pytest.raises(ConfigError, match="num_rounds is 0"):
        method(num_rounds=0)
    with pytest.raises(ConfigError, match="2 local epochs cannot be divided over 3 exchanges"):
        method(num_rounds=3)


def test_values_that_do_not_fit_their_places_are_refused() -> None:
    payload = put_sparse(Payload(), "change", torch.arange(8.0), 0.5)
    payload["change/values"] = torch.ones(3)
    with pytest.raises(PayloadError, match="3 values have 4 places"):
        read_sparse(payload, "change", 8)
    with pytest.raises(PayloadError, match="1 bytes do not hold 9 numbers of 1 bits"):
        read_sparse(put_sparse(Payload(), "change", torch.arange(8.0), 0.5), "change", 9)
