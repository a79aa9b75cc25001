"""Replay: the journal answers or nobody does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.client import ClientSide
from fedfuse.core.cohort import Cohort, Runtime, Terms
from fedfuse.core.errors import QuorumError
from fedfuse.core.examples import ClientData, Examples
from fedfuse.core.journal import Journal
from fedfuse.core.method import Method, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.core.registry import METHODS, RUNTIMES
from fedfuse.runtimes.local import LocalRuntime
from fedfuse.runtimes.replay import Replay

NAME = "replay_runtime_test"
SPEC = ModelSpec({"kind": "none"}, 0, (2,), 2)


@dataclass(frozen=True, kw_only=True)
class Toy(Method):
    @client_task(uploads=("x",), settings=(), state=True)
    def work(self, client: Any, msg: Payload) -> Payload:
        client.state["seen"] = True
        return Payload({"x": torch.rand(3, generator=client.rng.torch("x")) + client.data.train.x.mean()})


@pytest.fixture(autouse=True)
def _toy_is_registered() -> Iterator[None]:
    register_method(NAME)(Toy)
    yield
    del METHODS._entries[NAME], METHODS._facts[NAME]


def sides() -> dict[str, ClientSide]:
    found = {}
    for number, client_id in enumerate("ab"):
        examples = Examples(torch.full((3, 2), float(number)), torch.zeros(3, dtype=torch.int64))
        found[client_id] = ClientSide(client_id, ClientData(examples, examples, 2), SPEC)
    return found


def run(runtime: Runtime, journal: Journal, **changes: Any) -> list[dict[str, str]]:
    cohort = Cohort(runtime=runtime, method=Toy(), model_of=lambda client_id: SPEC, seed=1, journal=journal, **changes)
    return [{c: p.digest() for c, p in cohort.ask(Toy.work, key=key).items()} for key in ("one", "two")]


def test_the_journal_answers_as_the_clients_did(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        wanted = run(LocalRuntime(sides(), workers=1), journal)
    with Journal(tmp_path) as journal:
        runtime = Replay().open(sides())
        assert run(runtime, journal) == wanted
        runtime.close()


def test_what_the_journal_does_not_hold_is_missing(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        with pytest.raises(QuorumError) as caught:
            run(Replay().open(sides()), journal)
        reason = "the journal holds no answer to this question"
        assert caught.value.what == (
            f'0 of 2 clients answered the exchange "one", 2 are needed (a: {reason}; b: {reason})'
        )
        assert caught.value.where == str(tmp_path)
        assert journal.entries() == []


def test_a_part_of_the_clients_is_enough_where_the_quorum_says_so() -> None:
    journal = Journal()
    run(LocalRuntime({"a": sides()["a"]}, workers=1), journal)
    found = run(Replay().open(sides()), journal, terms=Terms(quorum=0.5))
    assert [list(each) for each in found] == [["a"], ["a"]]


@pytest.mark.parametrize("settings", [{"client_threads": 2}, {"device": "cuda"}])
def test_answers_that_were_computed_in_another_way_do_not_count(settings: dict[str, Any]) -> None:
    journal = Journal()
    run(LocalRuntime(sides(), workers=1), journal)
    with pytest.raises(QuorumError):
        run(Replay(**settings).open(sides()), journal)


def test_it_is_registered_and_knows_its_clients() -> None:
    assert RUNTIMES.get("replay") is Replay
    clients = Replay(client_threads=3, device="cuda").open(dict(reversed(sides().items()))).clients()
    assert list(clients) == ["a", "b"]
    assert (clients["a"].fingerprint, clients["a"].num_threads, clients["a"].device) == (
        sides()["a"].data.fingerprint,
        3,
        "cuda",
    )
