"""Ferret: a change crosses as coordinates, and what comes back is right in the mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_lora import LOCAL as LORA_LOCAL
from tiny_lora import lora_federation

from fedfuse.core.artifact import load_state
from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.payload import Payload
from fedfuse.core.seeding import Rng
from fedfuse.methods.changes import flat_parameters
from fedfuse.methods.fedavg import FedAvg
from fedfuse.methods.ferret import Ferret, directions_of
from fedfuse.ops.random_projection import rebuild
from fedfuse.training import LocalSGD, evaluate

LOCAL = LocalSGD(num_epochs=2, batch_size=16)


def method(**settings: Any) -> Ferret:
    return Ferret(**{"local": LOCAL, "num_rounds": 1, "num_coordinates": 64, "block_entries": 256, **settings})


def flat(fed: Any, state: Any) -> torch.Tensor:
    module = fed.spec.build()
    load_state(module, state)
    return flat_parameters(module).double()


def test_blocks_of_one_weight_give_fedavg(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    size = len(flat_parameters(fed.spec.build()))
    plain = fed.fuse(FedAvg(local=LOCAL, num_rounds=2))
    fused = fed.fuse(method(num_rounds=2, num_coordinates=size, block_entries=1))

    for name, tensor in plain.model.state.items():
        torch.testing.assert_close(fused.model.state[name], tensor, rtol=1e-5, atol=1e-5)


def test_the_server_rebuilds_each_clients_change_along_its_own_directions(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fused = fed.fuse(method())

    start = flat_parameters(fed.spec.build()).double()
    wanted = start.clone()
    for position, n in enumerate((24, 32, 40)):
        client_id, parts = f"client_{position}", []
        upload = fed.upload("round_0", client_id)
        shares = upload.tensor("projection/shares").tolist()
        assert sum(shares) == 64
        blocks = zip(upload.tensor("projection/coordinates").split(shares), start.split(256), strict=True)
        for number, (coordinates, block) in enumerate(blocks):
            draw = directions_of(fed.spec, client_id, 0).torch("block", number)
            parts.append(rebuild(coordinates, len(block), draw))
        wanted += n / 96 * torch.cat(parts)
    torch.testing.assert_close(flat(fed, fused.model.state), wanted, rtol=1e-6, atol=1e-6)


def test_clients_and_rounds_have_directions_of_their_own(federation: Any) -> None:
    spec = federation(width=4, depth=2).spec
    seeds = {directions_of(spec, client, number).seed for client in ("a", "b") for number in (0, 1)}
    assert len(seeds) == 4
    assert Rng(spec.seed).child("projection", "a", 0).seed in seeds


def test_more_coordinates_come_nearer(federation: Any) -> None:
    fed = federation(width=4, depth=2, num_clients=1)
    exact = flat(fed, fed.fuse(FedAvg(local=LOCAL)).model.state)
    start = flat_parameters(fed.spec.build()).double()
    size = len(start)

    relative = []
    for num in (size // 4, 4 * size):
        found = flat(fed, fed.fuse(method(num_coordinates=num)).model.state)
        relative.append(((found - exact).norm() / (exact - start).norm()).item())
    # By the formula they are about 2 and a half.
    assert relative == pytest.approx([2.0, 0.5], rel=0.25)
    shorter = flat(fed, fed.fuse(method(num_coordinates=size // 4, scaling="least_error")).model.state)
    assert ((shorter - exact).norm() / (exact - start).norm()).item() < 1.0


def test_what_crosses_does_not_grow_with_the_model(federation: Any) -> None:
    sizes = []
    for width in (8, 64):
        fed = federation("mlp", width=width, depth=2)
        fed.fuse(method(block_entries=4096))
        sizes.append(max(fed.runtime.upload_bytes.values()))
    assert sizes[1] - sizes[0] <= 16
    assert sizes[1] < 64 * 4 + 1000


def test_it_learns_what_is_left_of_the_change(federation: Any) -> None:
    fed = federation("mlp", width=16, depth=1)
    local = LocalSGD(num_epochs=12, batch_size=16, learning_rate=0.05)
    fused = fed.fuse(method(local=local, num_rounds=6, num_coordinates=512))

    assert evaluate(fused.model.module(), fed.test).accuracy > 0.7


def test_of_an_adapter_only_the_adapter_moves(federation: Any) -> None:
    fed = lora_federation(federation)
    fused = fed.fuse(method(local=LORA_LOCAL))
    assert set(fused.model.state) == set(fed.spec.build().state_dict())


def test_fewer_coordinates_than_blocks_are_told_before_anybody_works(federation: Any) -> None:
    fed = federation("mlp", width=64, depth=2)
    with pytest.raises(ConfigError) as caught:
        fed.fuse(method(num_coordinates=4, block_entries=1024))
    assert str(caught.value) == (
        "4 coordinates are too few for 9 blocks\n  where: method.num_coordinates\n"
        "  fix:   give at least 9, or a larger block_entries"
    )
    assert not fed.runtime.sent


@pytest.mark.parametrize("shares", [[64, 1, 1], [65, -1, 0], [62, 2, 0]])
def test_shares_that_do_not_add_up_are_told(shares: list[int]) -> None:
    upload = Payload({"projection/coordinates": torch.zeros(64), "projection/shares": torch.tensor(shares).int()})
    with pytest.raises(DataError) as caught:
        method()._rebuilt(upload, 700, Rng(0), "a")
    assert str(caught.value) == (
        f"its blocks have {sum(shares)} coordinates in all, 64 came\n  where: client a\n  fix:   leave this client out"
    )


@pytest.mark.parametrize("name", ["num_rounds", "num_coordinates", "block_entries"])
def test_a_wrong_setting_is_told(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        method(**{name: 0})
    assert str(caught.value) == f"{name} is 0\n  where: method.{name}\n  fix:   give at least 1"
