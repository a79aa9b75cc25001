"""What methods for adapters share."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny_lora import LOCAL, changes, lora_federation, tiny

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.cohort import Replies
from fedfuse.core.errors import ConfigError
from fedfuse.core.journal import Journal
from fedfuse.core.method import Job
from fedfuse.core.payload import Payload
from fedfuse.core.seeding import Rng
from fedfuse.methods.adapters import (
    ClientAdapters,
    FoldedRounds,
    FoldingRounds,
    folded,
    of_each_model,
    put_folded,
    rounded,
    summed,
)
from fedfuse.models.graph import user_spec
from fedfuse.ops.lora import Factors


def one(value: float) -> dict[str, Factors]:
    """A change of one weight, 2 x 2, whose upper left number is ``value``."""
    left, right = torch.zeros(2, 1).double(), torch.zeros(1, 2).double()
    left[0, 0], right[0, 0] = value, 1.0
    return {"w": Factors(left, right)}


def replies(*client_ids: str) -> Replies:
    journal = Journal()
    return Replies({c: journal.put(c, Payload().encode(), {}) for c in client_ids}, {})


def test_tables_add_up_to_no_higher_rank_than_the_weight_has() -> None:
    assert summed([]) == {}
    whole = summed([one(1.0), one(2.0), one(4.0)])["w"]
    assert whole.rank == 2
    torch.testing.assert_close(whole.product(), torch.tensor([[7.0, 0.0], [0.0, 0.0]]).double(), rtol=0, atol=1e-6)


def test_who_has_heard_which_rounds() -> None:
    base = FoldedRounds()
    base.note(replies("a", "b"))
    base.rounds.append(one(1.0))
    base.note(replies("a"))
    base.rounds.append(one(2.0))
    assert base.heard == {"a": 1, "b": 0}
    assert base.total()["w"].product()[0, 0].item() == pytest.approx(3.0)


def test_changes_travel_as_float32() -> None:
    table = one(1 / 3)
    sent = put_folded(Payload({"num_epochs": 1}), table)
    assert {key: str(value.dtype) for key, value in sent.items() if isinstance(value, torch.Tensor)} == {
        "folded_left/w": "torch.float32",
        "folded_right/w": "torch.float32",
    }
    assert torch.equal(folded(Payload.decode(sent.encode()))["w"].left, rounded(table["w"]).left)
    assert folded(Payload()) == {}


def test_an_adapter_has_the_rank_that_its_changes_need_and_at_least_one() -> None:
    job = Job(model=tiny(rank=2), rng=Rng(0), device=torch.device("cpu"))
    adapters = ClientAdapters.of(job, "flora")
    names = list(adapters.common.modules)
    shapes = [adapters.common.modules[name].shape for name in names]
    draw = torch.Generator().manual_seed(0)
    left = [torch.randn(shape[0], 3, dtype=torch.float64, generator=draw) for shape in shapes]
    right = [torch.randn(3, shape[1], dtype=torch.float64, generator=draw) for shape in shapes]
    others = {key: job.model.build().state_dict()[key] for key in adapters.common.others}
    # Twice the same change beside itself: rank 6 on paper, 3 in truth.
    twice = {
        name: Factors(torch.cat([b, b], 1), torch.cat([a, a])) for name, b, a in zip(names, left, right, strict=True)
    }
    artifact = adapters.artifact(job, twice, others)
    assert job.facts["adapter_rank"] == 3
    for name, delta in changes(artifact, artifact.state).items():
        torch.testing.assert_close(delta, twice[name].product(), rtol=1e-5, atol=1e-5)
    nothing = {
        name: Factors(torch.zeros(s[0], 2).double(), torch.zeros(2, s[1]).double())
        for name, s in zip(names, shapes, strict=True)
    }
    empty = adapters.artifact(job, nothing, others)
    assert job.facts["adapter_rank"] == 1
    assert all(not delta.any() for delta in changes(empty, empty.state).values())


def test_a_model_that_comes_with_its_adapter_trains_on_from_it(federation: Any) -> None:
    first = tiny().build()
    state = {key: torch.full_like(tensor, 0.1) for key, tensor in first.state_dict().items()}
    model = dataclasses.replace(tiny(), initial=state)
    job = Job(model=model, rng=Rng(0), device=torch.device("cpu"))
    adapters = ClientAdapters.of(job, "flora")
    artifact = adapters.artifact(job, adapters.common.factors(state), {k: state[k] for k in adapters.common.others})
    assert job.facts["adapter_rank"] == 1  # all numbers alike
    for name, delta in changes(artifact, artifact.state).items():
        torch.testing.assert_close(delta, changes(model, state)[name], rtol=1e-5, atol=1e-6)


def test_ranks_of_clients(federation: Any) -> None:
    fed = lora_federation(federation, ranks={"client_1": 5})
    adapters = ClientAdapters.of(fed.job, "flora")
    assert (adapters.rank, adapters.of_client("client_1").rank, adapters.of_client("client_0").rank) == (5, 5, 2)


def test_equal_models_are_looked_at_once() -> None:
    own = {"b": tiny(1), "a": tiny(3), "c": tiny(1)}
    job = Job(model=tiny(), rng=Rng(0), device=torch.device("cpu"), client_models=own)
    seen: list[int] = []

    def rank(model: ModelSpec) -> int:
        seen.append(model.recipe["peft"]["rank"])
        return seen[-1]

    assert of_each_model(job, rank) == {"a": 3, "b": 1, "c": 1}
    assert seen == [3, 1]


def test_too_few_epochs_are_told_before_anybody_works() -> None:
    with pytest.raises(ConfigError, match="4 local epochs cannot be divided over 5 exchanges"):
        FoldingRounds(local=LOCAL, num_rounds=5)


def test_a_foundation_model_from_python_keeps_its_recipe() -> None:
    module = tiny().build()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.fill_(0.5)
    own = user_spec(module, input_shape=(8,), num_classes=4, seed=0)
    assert own.recipe == tiny().recipe
    assert own.template is None
    assert all(bool((tensor == 0.5).all()) for tensor in own.build().state_dict().values())
    job = Job(model=own, rng=Rng(0), device=torch.device("cpu"))
    assert ClientAdapters.of(job, "flora").rank == 2
    # Something else of that name is none of ours.
    plain = torch.nn.Sequential(torch.nn.Linear(8, 4))
    plain.recipe = {"kind": "cake"}  # type: ignore[assignment]
    assert user_spec(plain, input_shape=(8,), num_classes=4, seed=0).recipe["kind"] == "graph"
