"""One request on the client's side: what the task sees, and how it may fail."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.client import ClientSide, Reply, Request, StateStore, fixed_threads, peak_rss_bytes, perform
from fedfuse.core.errors import DataError, JournalError
from fedfuse.core.examples import ClientData, Examples
from fedfuse.core.method import Method, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.core.registry import METHODS

NAME = "client_test"


@dataclass(frozen=True, kw_only=True)
class Toy(Method):
    mode: str = ""
    hidden: int = 1

    @client_task(uploads=("w/*", "n"), settings=("mode",))
    def work(self, client: Any, msg: Payload) -> Payload:
        if self.mode == "undeclared setting":
            return Payload({"n": self.hidden})
        if self.mode == "undeclared key":
            return Payload({"n": 1, "w/a": torch.ones(1), "secret": 1})
        if self.mode == "undeclared state":
            client.state["x"] = 1
        if self.mode == "no payload":
            return {"n": 1}  # type: ignore[return-value]
        if self.mode == "bug":
            return Payload({"n": int("three")})
        if self.mode == "friendly":
            raise DataError("there is nothing to learn from", where="shelf 3", fix="bring data")
        if self.mode == "exit":
            raise SystemExit(3)
        client.progress(1, 2)
        drawn = [torch.rand(1), torch.rand(1, generator=client.rng.torch("x")), torch.tensor([random.random()])]
        return Payload({"n": len(client.data.train)}).put_group("w", {str(i): x for i, x in enumerate(drawn)})

    @client_task(uploads=("count",), settings=(), state=True)
    def count(self, client: Any, msg: Payload) -> Payload:
        client.state["count"] = int(client.state.get("count", 0)) + 1
        return Payload({"count": client.state["count"]})


@pytest.fixture(autouse=True)
def _toy_is_registered() -> Iterator[None]:
    register_method(NAME)(Toy)
    yield
    del METHODS._entries[NAME], METHODS._facts[NAME]


def side(folder: Path | None = None) -> ClientSide:
    examples = Examples(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
    spec = ModelSpec({"kind": "none"}, 0, (2,), 2)
    return ClientSide("c", ClientData(examples, examples, 2), spec, states=StateStore(folder))


def ask(mode: str = "", task: str = "work", on: ClientSide | None = None, **changes: Any) -> Reply:
    request = Request(NAME, {"mode": mode}, task, "one", "c", 5, "", "answer", Payload().encode())
    return perform(dataclasses.replace(request, **changes), on or side())


def test_a_task_answers_with_an_encoded_payload() -> None:
    reply = ask()
    assert reply.upload is not None
    assert Payload.decode(reply.upload)["n"] == 4
    assert (reply.client_id, reply.error, reply.breaks_contract) == ("c", "", False)
    assert reply.seconds > 0
    assert reply.peak_rss_bytes > 1 << 20


def test_every_kind_of_randomness_comes_from_the_requests_seed() -> None:
    first = ask()
    torch.manual_seed(9)
    random.seed(9)
    before = torch.get_rng_state()
    second, other = ask(), ask(seed=6)
    assert first.upload == second.upload
    assert torch.get_rng_state().equal(before)
    assert first.upload is not None
    assert other.upload is not None
    a, b = Payload.decode(first.upload).group("w"), Payload.decode(other.upload).group("w")
    assert all(not a[name].equal(b[name]) for name in ("0", "1", "2"))


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    request = Request(NAME, {}, "work", "one", "c", 5, "", "answer", Payload().encode())
    perform(request, side(), lambda done, total: told.append((done, total)))
    assert told == [(1, 2)]


@pytest.mark.parametrize(
    ("mode", "error"),
    [
        (
            "undeclared setting",
            (
                'the task "work" reads the setting "hidden" that it did not declare\n'
                f"  where: {__name__}.Toy\n"
                '  fix:   add "hidden" to @client_task(settings=...)'
            ),
        ),
        (
            "undeclared key",
            (
                'the task "work" uploads "secret" that it did not declare\n'
                "  where: client_test\n"
                "  fix:   add it to @client_task(uploads=...) or do not send it"
            ),
        ),
        (
            "undeclared state",
            (
                'the task "work" writes client.state without declaring it\n'
                "  where: client_test\n"
                "  fix:   use @client_task(..., state=True)"
            ),
        ),
        ("no payload", 'the task "work" returned a dict\n  where: client_test\n  fix:   return a Payload'),
    ],
)
def test_a_task_that_breaks_the_contract_says_so(mode: str, error: str) -> None:
    reply = ask(mode)
    assert reply.upload is None
    assert reply.breaks_contract
    assert reply.error == error


def test_a_task_that_fails_names_the_exception_and_the_place() -> None:
    reply = ask("bug")
    line = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if 'int("three")' in text)
    assert reply.error == f"ValueError: invalid literal for int() with base 10: 'three' (test_client.py:{line})"
    assert reply.upload is None
    assert not reply.breaks_contract


def test_an_error_of_ours_keeps_its_words() -> None:
    reply = ask("friendly")
    assert reply.error == "there is nothing to learn from\n  where: shelf 3\n  fix:   bring data"
    assert not reply.breaks_contract


def test_a_task_that_leaves_the_program_costs_only_its_client() -> None:
    # Libraries that are meant for the command line call sys.exit.
    reply = ask("exit")
    assert reply.upload is None
    assert reply.error.startswith("SystemExit: 3 (test_client.py:")


def test_settings_and_messages_that_cannot_be_read_cost_only_this_client() -> None:
    assert ask("", settings={"mod": 1}).error.startswith('unknown setting "mod"\n  where: method.mod')
    assert ask("", payload=b"x").error.startswith("the bytes are not a payload: 1 bytes")
    assert ask("", method="no such method").error.startswith('there is no method "no such method"')


@pytest.mark.parametrize("in_folder", [False, True])
def test_state_lasts_from_answer_to_answer(in_folder: bool, tmp_path: Path) -> None:
    client = side(tmp_path if in_folder else None)
    assert ask(task="count", on=client, answer_key="a").upload == Payload({"count": 1}).encode()
    assert ask(task="count", on=client, lineage="a", answer_key="b").upload == Payload({"count": 2}).encode()
    # The same question finds the state that it found before.
    assert ask(task="count", on=client, lineage="a", answer_key="b").upload == Payload({"count": 2}).encode()
    assert ask(task="count", on=client, answer_key="a").upload == Payload({"count": 1}).encode()
    assert client.states.load("c", "b")["count"] == 2
    assert len(client.states.load("c", "")) == 0


@pytest.mark.parametrize("in_folder", [False, True])
def test_a_state_that_is_gone_is_named(in_folder: bool, tmp_path: Path) -> None:
    folder = tmp_path if in_folder else None
    with pytest.raises(JournalError) as caught:
        StateStore(folder).load("c", "a")
    assert str(caught.value) == (
        f"the state of c after an earlier exchange is gone or damaged\n  where: {folder or 'memory'}\n"
        "  fix:   delete the run's journal and start again, or leave this client out"
    )
    assert ask(task="count", on=side(folder), lineage="a").error == str(caught.value)


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    store.save("c", "a", Payload({"x": 1}))
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(JournalError, match="is gone or damaged"):
        store.load("c", "a")


def test_states_of_different_clients_are_apart(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        store = StateStore(folder)
        store.save("c", "a", Payload({"x": 1}))
        store.save("d", "a", Payload({"x": 2}))
        assert (store.load("c", "a")["x"], store.load("d", "a")["x"]) == (1, 2)


def test_the_number_of_threads_is_put_back() -> None:
    before = torch.get_num_threads()
    with fixed_threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before


def test_a_process_knows_its_peak_of_memory() -> None:
    assert peak_rss_bytes() > 1 << 20


def test_a_state_that_many_exchanges_leave_as_it_is_is_kept_once(tmp_path: Path) -> None:
    store, state = StateStore(tmp_path), Payload({"logits": torch.arange(4.0)})
    for k in range(3):
        store.save("a", f"answer_{k}", state)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == 1
    assert all(torch.equal(store.load("a", f"answer_{k}").tensor("logits"), torch.arange(4.0)) for k in range(3))


def test_a_state_that_was_damaged_is_told(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    store.save("a", "answer", Payload({"x": 1}))
    next((tmp_path / "a").glob("*.safetensors")).write_bytes(b"something else")
    with pytest.raises(JournalError, match="the state of a after an earlier exchange is gone or damaged"):
        store.load("a", "answer")
