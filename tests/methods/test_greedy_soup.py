"""A greedy soup: who is taken in, and by whose judgement."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedfuse.core.artifact import load_state
from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.examples import ClientData, Examples
from fedfuse.methods.greedy_soup import GreedySoup
from fedfuse.training import LocalSGD, evaluate

METHOD = GreedySoup(local=LocalSGD(num_epochs=3, batch_size=16))


def correct(fed: Any, state: Any, examples: Examples) -> int:
    module = fed.spec.build()
    load_state(module, state)
    return int(evaluate(module, examples).confusion.diagonal().sum())


def by_hand(fed: Any, states: list[dict[str, torch.Tensor]], judges: list[Examples]) -> tuple[list[int], Any]:
    def score(state: Any) -> int:
        return sum(correct(fed, state, examples) for examples in judges)

    def mean(members: list[int]) -> dict[str, torch.Tensor]:
        return {
            name: torch.stack([states[i][name].double() for i in sorted(members)]).mean(0).to(states[0][name].dtype)
            for name in states[0]
        }

    order = sorted(range(len(states)), key=lambda i: (-score(states[i]), i))
    soup = [order[0]]
    for i in order[1:]:
        if score(mean([*soup, i])) >= score(mean(soup)):
            soup.append(i)
    return sorted(soup), mean(soup)


@pytest.mark.parametrize("on_server", [False, True])
def test_the_soup_is_the_one_made_by_hand(federation: Any, on_server: bool) -> None:
    fed = federation("mlp", num_clients=4, width=8, depth=1)
    if on_server:
        fed.job = replace(fed.job, server_data=fed.test)
    fused = fed.fuse(METHOD).model.state
    states = [fed.upload("local_models", f"client_{i}").group("model") for i in range(4)]
    judges = [fed.test] if on_server else [fed.data[f"client_{i}"].validation for i in range(4)]
    members, wanted = by_hand(fed, states, judges)
    assert fed.job.facts["soup"] == [f"client_{i}" for i in members]
    for name, tensor in wanted.items():
        torch.testing.assert_close(fused[name], tensor)
    exchanges = fed.cohort.ledger.exchanges()
    assert exchanges == ["local_models"] if on_server else ["local_models", "single_models", *exchanges[2:]]
    assert on_server or exchanges[2:] == ["soup_1", "soup_2", "soup_3"]


def test_server_data_without_labels_do_not_judge(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=1)
    fed.job = replace(fed.job, server_data=Examples(fed.test.x, torch.full_like(fed.test.y, -1)))
    fed.fuse(METHOD)
    assert "single_models" in fed.cohort.ledger.exchanges()


def test_bytes_of_every_candidate_are_counted(federation: Any) -> None:
    fed = federation("mlp", width=8, depth=2)
    fed.fuse(METHOD)
    model = fed.upload("local_models", "client_0").num_bytes
    sent = {e.exchange: e.download_bytes for e in fed.cohort.ledger.entries if e.client == "client_0"}
    assert sent["single_models"] > 2.7 * model
    assert sent["soup_1"] > 0.9 * model


def test_a_client_that_leaves_before_it_judges(federation: Any) -> None:
    away = [("soup_1", "client_0"), ("soup_2", "client_1")]
    fed = federation("mlp", width=8, depth=1, absent=away, quorum=0.6)
    assert evaluate(fed.fuse(METHOD).model.module(), fed.test).accuracy > 0.4


def test_one_client_is_its_own_soup(federation: Any) -> None:
    fed = federation("mlp", num_clients=1, width=8, depth=1)
    fused = fed.fuse(METHOD).model.state
    assert fed.cohort.ledger.exchanges() == ["local_models"]
    assert fused["1.weight"].equal(fed.upload("local_models", "client_0").tensor("model/1.weight"))


def test_nobody_has_validation_examples(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=1)
    sides = fed.runtime.inner._sides
    for client_id, data in fed.data.items():
        bare = ClientData(data.train, data.validation.subset([]), data.num_classes)
        sides[client_id] = replace(sides[client_id], data=bare)
    with pytest.raises(DataError) as caught:
        fed.fuse(METHOD)
    assert str(caught.value) == (
        "no client has validation examples to choose the soup by\n  where: data.validation_fraction\n"
        "  fix:   set it above 0, or give the server data of its own"
    )


def test_different_models_are_refused(federation: Any) -> None:
    fed = federation(width=4, depth=2, client_models={"client_1": ("mlp", {"width": 4})})
    with pytest.raises(ConfigError, match="weights of different architectures cannot be averaged"):
        fed.fuse(METHOD)
