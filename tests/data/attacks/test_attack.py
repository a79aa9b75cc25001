"""Who attacks, and what becomes of the federation."""

from __future__ import annotations

import pytest
import torch

from fedfuse.core.errors import ConfigError
from fedfuse.core.examples import Examples
from fedfuse.core.registry import ATTACKS
from fedfuse.data.attacks import Attack, HostileClients
from fedfuse.data.attacks.backdoor import Backdoor
from fedfuse.data.attacks.free_rider import FreeRider
from fedfuse.data.attacks.label_flip import LabelFlip
from fedfuse.data.attacks.none import NoAttack
from fedfuse.data.federate import FederatedData, from_clients


def federation(num_clients: int = 4, num_examples: int = 12) -> FederatedData:
    g = torch.Generator().manual_seed(0)
    parts = [
        (torch.rand(num_examples, 1, 4, 4, generator=g), torch.arange(num_examples) % 3) for _ in range(num_clients)
    ]
    return from_clients(parts, parts[0], validation_fraction=0.25)


def test_all_are_registered() -> None:
    wanted = ["backdoor", "free_rider", "label_flip", "noise", "none", "scaled", "sign_flip"]
    assert ATTACKS.names() == wanted
    assert all(issubclass(ATTACKS.get(name), Attack) for name in wanted)


def test_a_number_is_the_first_in_the_order_of_ids() -> None:
    data = federation(12)
    assert HostileClients.among(data, "none", NoAttack(), 3).clients == ("client_00", "client_01", "client_02")
    named = HostileClients.among(data, "none", NoAttack(), ["client_07", "client_02"])
    assert named.clients == ("client_02", "client_07")
    assert HostileClients.among(data, "none", NoAttack(), 0).clients == ()


def test_there_must_be_such_clients() -> None:
    with pytest.raises(ConfigError) as caught:
        HostileClients.among(federation(), "none", NoAttack(), 5)
    assert str(caught.value) == (
        "5 of 4 clients cannot be hostile\n  where: attack.clients\n"
        "  fix:   give a number from 0 to 4, or a list of ids"
    )
    with pytest.raises(ConfigError, match='there is no client "client_9"') as caught:
        HostileClients.among(federation(), "none", NoAttack(), ["client_9"])
    assert caught.value.where == "attack.clients"


def test_only_the_hostile_clients_data_change() -> None:
    data = federation()
    poisoned = HostileClients.among(data, "label_flip", LabelFlip(), ["client_1"]).poisoned(data, seed=0)
    assert poisoned.test is data.test
    for client_id, part in poisoned.clients.items():
        honest = data.clients[client_id]
        assert (part.fingerprint == honest.fingerprint) == (client_id != "client_1")
    mirrored = poisoned.clients["client_1"]
    assert mirrored.train.y.equal(2 - data.clients["client_1"].train.y)
    assert mirrored.validation.y.equal(2 - data.clients["client_1"].validation.y)


def test_the_seed_says_what_is_poisoned_and_the_other_clients_do_not() -> None:
    data = federation()
    one, two = (HostileClients.among(data, "backdoor", Backdoor(), c) for c in (["client_1"], ["client_0", "client_1"]))
    first = one.poisoned(data, seed=3).clients["client_1"].fingerprint
    assert first == two.poisoned(data, seed=3).clients["client_1"].fingerprint
    assert first != one.poisoned(data, seed=4).clients["client_1"].fingerprint


def test_what_is_wanted_needs_a_test_set_and_an_attack_that_wants_something() -> None:
    data = federation()
    wanted = HostileClients.among(data, "label_flip", LabelFlip(), 1).wanted(data)
    assert data.test is not None
    assert wanted is not None
    assert len(wanted) == 8
    assert HostileClients.among(data, "free_rider", FreeRider(), 1).wanted(data) is None
    bare = from_clients([(torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 0, 1]))])
    assert HostileClients.among(bare, "label_flip", LabelFlip(), 1).wanted(bare) is None


def test_the_base_changes_nothing() -> None:
    examples = Examples(torch.rand(3, 2), torch.tensor([0, 1, 2]))
    x, attack = torch.tensor([1.0]), Attack()
    assert attack.forge(x, x, torch.Generator()) is x
    assert not attack.forges_uploads
    assert attack.poison(examples, None, None) is examples  # type: ignore[arg-type]
    assert attack.wanted(examples, None) is None  # type: ignore[arg-type]
