"""The laws of ``cohort.ask``, with runtimes that say whatever they like."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.client import ClientSide, Reply, Request, StateStore, perform
from fedfuse.core.cohort import ClientFacts, Cohort, Terms, check_client_id
from fedfuse.core.errors import ConfigError, JournalError, QuorumError, TaskError
from fedfuse.core.examples import ClientData, Examples
from fedfuse.core.expecting import TensorSpec
from fedfuse.core.journal import Journal
from fedfuse.core.method import Method, client_task, register_method
from fedfuse.core.payload import Payload, PayloadFile
from fedfuse.core.registry import METHODS
from fedfuse.core.seeding import derive_seed

NAME = "cohort_test"
IDS = ["a", "b", "c"]
EXPECT = {"w/x": TensorSpec((2,)), "n": int}


@dataclass(frozen=True, kw_only=True)
class Toy(Method):
    used: int = 1
    unused: int = 1

    @client_task(uploads=("w/*", "n", "curve/*"), settings=("used",))
    def once(self, client: Any, msg: Payload) -> Payload:
        start = msg.tensor("w/x") if "w/x" in msg else torch.zeros(2)
        drawn = torch.rand(2, generator=client.rng.torch("x"))
        return Payload({"n": self.used, "w/x": start + drawn})

    @client_task(uploads=("count",), settings=(), state=True)
    def count(self, client: Any, msg: Payload) -> Payload:
        client.state["count"] = int(client.state.get("count", 0)) + 1
        return Payload({"count": client.state["count"]})

    def unmarked(self, client: Any, msg: Payload) -> Payload:
        return Payload()


@dataclass(frozen=True, kw_only=True)
class Heir(Toy):
    extra: int = 1


@pytest.fixture(autouse=True)
def _toys_are_registered() -> Iterator[None]:
    for name, cls in ((NAME, Toy), (NAME + "_heir", Heir)):
        register_method(name)(cls)
    yield
    for name in (NAME, NAME + "_heir"):
        del METHODS._entries[name], METHODS._facts[name]


SPEC = ModelSpec({"kind": "none"}, 0, (2,), 2)


def sides(ids: Sequence[str] = IDS, folder: Path | None = None) -> dict[str, ClientSide]:
    found, states = {}, StateStore(folder)
    for number, client_id in enumerate(ids):
        examples = Examples(torch.full((3, 2), float(number)), torch.zeros(3, dtype=torch.int64))
        found[client_id] = ClientSide(client_id, ClientData(examples, examples, 2), SPEC, states=states)
    return found


Answer = Callable[[Request], "Reply | Sequence[Reply]"]


@dataclass
class Fake:
    """A runtime whose replies a test writes; by default clients carry out what they are asked for."""

    sides: Mapping[str, ClientSide] = field(default_factory=sides)
    answer: Answer | None = None
    order: Callable[[list[Reply]], list[Reply]] = list
    facts: Mapping[str, ClientFacts] | None = None
    asked: list[Request] = field(default_factory=list)
    timeouts: list[float | None] = field(default_factory=list)

    def clients(self) -> Mapping[str, ClientFacts]:
        if self.facts is not None:
            return self.facts
        return {client_id: ClientFacts(side.data.fingerprint) for client_id, side in self.sides.items()}

    def exchange(
        self, requests: Sequence[Request], *, timeout_s: float | None, progress: Callable[[str, int, int], None]
    ) -> Iterator[Reply]:
        self.timeouts.append(timeout_s)
        replies: list[Reply] = []
        for request in requests:
            self.asked.append(request)
            progress(request.client_id, 1, 2)
            found = self.answer(request) if self.answer else perform(request, self.sides[request.client_id])
            replies.extend([found] if isinstance(found, Reply) else found)
        yield from self.order(replies)

    def close(self) -> None:
        pass


def cohort(runtime: Fake | None = None, method: Method | None = None, **changes: Any) -> Cohort:
    arguments: dict[str, Any] = {"runtime": runtime or Fake(), "method": method or Toy(), "seed": 1, **changes}
    return Cohort(**{"model_of": lambda client_id: SPEC, **arguments})


GOOD = Payload({"w/x": torch.ones(2), "n": 1})


def bad_for(client_id: str, upload: Payload | bytes | None, error: str = "") -> Answer:
    """Everybody answers well but one."""
    data = upload.encode() if isinstance(upload, Payload) else upload

    def answer(request: Request) -> Reply:
        if request.client_id == client_id:
            return Reply(client_id, upload=data, error=error)
        return Reply(request.client_id, upload=GOOD.encode(), seconds=0.5, peak_rss_bytes=7)

    return answer


def bits(replies: Mapping[str, Payload]) -> dict[str, str]:
    return {client_id: payload.digest() for client_id, payload in replies.items()}


# --- what a client is asked


def test_a_request_carries_what_the_client_needs_and_nothing_else() -> None:
    runtime = Fake()
    cohort(runtime, Toy(used=4)).ask(Toy.once, Payload({"m": 1}), key="one")
    request = runtime.asked[0]
    assert (request.method, request.task, request.exchange, request.client_id) == (NAME, "once", "one", "a")
    assert request.settings == {"used": 4, "unused": 1}
    assert request.payload == Payload({"m": 1}).encode()
    assert request.seed == derive_seed(1, "a", "one")
    assert request.lineage == ""
    assert len(request.answer_key) == 40


def test_seeds_differ_by_client_by_exchange_and_by_run() -> None:
    runtime = Fake()
    for seed in (1, 2):
        each = cohort(runtime, seed=seed)
        for key in ("one", "two"):
            each.ask(Toy.once, key=key)
    assert len({request.seed for request in runtime.asked}) == 12


def test_a_task_may_be_named_on_the_class_or_on_the_method() -> None:
    assert bits(cohort().ask(Toy.once, key="one")) == bits(cohort().ask(Toy().once, key="one"))


def test_what_is_no_task_is_refused() -> None:
    with pytest.raises(TaskError) as caught:
        cohort().ask(Toy.unmarked, key="one")
    assert str(caught.value) == (
        f'"unmarked" is no client task\n  where: {NAME}\n  fix:   mark it with @client_task(uploads=...)'
    )


def test_only_those_are_asked_to_whom_something_is_sent() -> None:
    runtime = Fake()
    replies = cohort(runtime).ask(Toy.once, {"c": Payload({"w/x": torch.full((2,), 9.0)}), "a": Payload()}, key="one")
    assert list(replies) == ["a", "c"]
    assert [request.client_id for request in runtime.asked] == ["a", "c"]
    assert float(replies["c"].tensor("w/x").min()) >= 9 > float(replies["a"].tensor("w/x").max())
    assert replies.missing == {}


def test_a_client_that_is_not_there_cannot_be_asked() -> None:
    runtime = Fake()
    with pytest.raises(TaskError) as caught:
        cohort(runtime).ask(Toy.once, {"d": Payload(), "a": Payload()}, key="one")
    assert str(caught.value) == f'there is no client "d"\n  where: {NAME}\n  fix:   clients are: a, b, c'
    assert runtime.asked == []


def test_two_exchanges_cannot_have_one_key() -> None:
    each = cohort()
    each.ask(Toy.once, key="one")
    with pytest.raises(TaskError) as caught:
        each.ask(Toy.count, key="one")
    assert str(caught.value) == (
        f'two exchanges have the key "one"\n  where: {NAME}\n  fix:   give each ask a key of its own'
    )


def test_the_time_limit_is_the_operators_unless_the_method_has_one() -> None:
    runtime = Fake()
    each = cohort(runtime, terms=Terms(timeout_s=7))
    each.ask(Toy.once, key="one")
    each.ask(Toy.once, key="two", timeout_s=3)
    cohort(runtime).ask(Toy.once, key="one")
    assert runtime.timeouts == [7, 3, None]


# --- what a client answers


def test_replies_stand_in_the_order_of_the_ids_whatever_the_order_of_arrival(tmp_path: Path) -> None:
    wanted = bits(cohort().ask(Toy.once, key="one"))
    assert list(wanted) == IDS
    for number, order in enumerate(itertools.permutations(range(3))):
        runtime = Fake(order=lambda replies, order=order: [replies[i] for i in order])
        with Journal(tmp_path / str(number)) as journal:
            each = cohort(runtime, journal=journal)
            replies = each.ask(Toy.once, key="one")
            assert list(replies) == IDS
            assert bits(replies) == wanted
            assert list(replies.numbers("n")) == IDS
            assert [dict(upload)["n"] for upload in replies.uploads()] == [1, 1, 1]
            assert [entry["client"] for entry in each.ledger.to_json()["entries"]] == IDS


def test_the_order_of_the_clients_changes_nothing() -> None:
    shuffled = dict(reversed(sides().items()))
    assert list(shuffled) == ["c", "b", "a"]
    each = cohort(Fake(shuffled))
    assert each.client_ids == IDS
    assert bits(each.ask(Toy.once, key="one")) == bits(cohort().ask(Toy.once, key="one"))


def test_the_other_clients_change_nothing() -> None:
    alone = cohort(Fake({"b": sides()["b"]})).ask(Toy.once, key="one")
    assert alone["b"].digest() == cohort().ask(Toy.once, key="one")["b"].digest()


def test_replies_do_not_alias_what_was_sent_or_kept() -> None:
    sent = Payload({"w/x": torch.zeros(2)})
    replies = cohort().ask(Toy.once, sent, key="one")
    before = replies["a"].digest()
    replies["a"].tensor("w/x").zero_()
    assert replies["a"].digest() == before
    assert sent.tensor("w/x").tolist() == [0, 0]


def test_uploads_are_read_lazily_from_a_folder(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        replies = cohort(journal=journal).ask(Toy.once, key="one")
        assert all(isinstance(upload, PayloadFile) for upload in replies.uploads())


def header_only(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


HEADER_BYTES = int.from_bytes(GOOD.encode()[:8], "little")
BAD = {
    "undeclared": (Payload({**GOOD, "secret": 1}), "the key was not declared", "secret"),
    "shape": (Payload({**GOOD, "w/x": torch.ones(3)}), "its shape is (3,), wanted (2,)", "w/x"),
    "dtype": (
        Payload({**GOOD, "w/x": torch.ones(2).half()}),
        "its dtype is torch.float16, wanted torch.float32",
        "w/x",
    ),
    "nan": (Payload({**GOOD, "w/x": torch.tensor([1, math.nan])}), "it holds NaN or infinite values", "w/x"),
    "missing": (Payload({"w/x": torch.ones(2)}), "the key is missing", "n"),
    "unexpected": (Payload({**GOOD, "w/y": torch.ones(2)}), "the key was not expected", "w/y"),
    "scalar": (Payload({**GOOD, "n": 1.0}), "it is a float, wanted a int", "n"),
    "large": (b"\0" * (1 << 26), "67,108,864 bytes are more than the limit of 34,603,024", ""),
    "cut": (GOOD.encode()[:50], f"the bytes are not a payload: 50 bytes with a header of {HEADER_BYTES}", ""),
    "random": (b"\xff" * 8, "the bytes are not a payload: 8 bytes with a header of 18446744073709551615", ""),
    "table": (header_only(b"[]"), "the bytes are not a payload: the header is not a table", ""),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_upload_costs_only_its_client(kind: str, tmp_path: Path) -> None:
    upload, reason, key = BAD[kind]
    where = "client b" + (f", key '{key}'" if key else "")
    text = f"the upload was refused: {reason}\n  where: {where}\n  fix:   the client must send what the task declares"
    logged: list[Mapping[str, Any]] = []
    with Journal(tmp_path) as journal:
        each = cohort(Fake(answer=bad_for("b", upload)), journal=journal, log=logged.append, terms=Terms(quorum=0.5))
        replies = each.ask(Toy.once, key="one", expect=EXPECT)
        assert list(replies) == ["a", "c"]
        assert replies.missing == {"b": text}
        assert each.missing == {"b": f"one: {text}"}
        assert len(journal.entries()) == 2
    assert logged == [{"event": "missing", "exchange": "one", "client": "b", "reason": text}]
    entries = {entry["client"]: entry for entry in each.ledger.to_json()["entries"]}
    assert entries["b"]["upload_bytes"] == 0
    assert entries["b"]["download_bytes"] == entries["a"]["download_bytes"] == len(Payload().encode())
    assert entries["a"]["upload_bytes"] == len(GOOD.encode())
    assert each.uploads == {"one": {"a": GOOD.digest(), "c": GOOD.digest()}}


def test_a_dtype_that_cannot_be_checked_costs_only_its_client() -> None:
    upload = Payload({**GOOD, "w/x": torch.ones(2).to(torch.float8_e4m3fn)})
    replies = cohort(Fake(answer=bad_for("b", upload))).ask(Toy.once, key="one", expect=EXPECT, quorum=0.5)
    assert list(replies) == ["a", "c"]


def test_what_is_expected_may_differ_by_client() -> None:
    wanted = {"a": EXPECT, "b": {**EXPECT, "w/x": TensorSpec((3,))}, "c": EXPECT}
    runtime = Fake(answer=bad_for("b", Payload({**GOOD, "w/x": torch.ones(3)})))
    assert list(cohort(runtime).ask(Toy.once, key="one", expect=wanted.__getitem__)) == IDS


def test_a_client_that_failed_says_why() -> None:
    each = cohort(Fake(answer=bad_for("b", None, "its disk is full")))
    assert each.ask(Toy.once, key="one", quorum=0.6).missing == {"b": "its disk is full"}


def test_a_client_that_says_nothing_is_missing() -> None:
    runtime = Fake(order=lambda replies: [reply for reply in replies if reply.client_id != "b"])
    each = cohort(runtime)
    replies = each.ask(Toy.once, key="one", quorum=0.6)
    assert replies.missing == {"b": "no reply"}
    assert [(entry["client"], entry["upload_bytes"] > 0) for entry in each.ledger.to_json()["entries"]] == [
        ("a", True),
        ("b", False),
        ("c", True),
    ]


@pytest.mark.parametrize("stranger", ["a", "z", ""])
def test_replies_that_nobody_waits_for_are_ignored(stranger: str) -> None:
    # One that is not a client, and a second answer of one that is.
    def answer(request: Request) -> list[Reply]:
        own = Reply(request.client_id, upload=GOOD.encode())
        return [own, Reply(stranger, upload=Payload({**GOOD, "n": 2}).encode())] if request.client_id == "a" else [own]

    logged: list[Mapping[str, Any]] = []
    each = cohort(Fake(answer=answer), log=logged.append)
    replies = each.ask(Toy.once, key="one")
    assert bits(replies) == dict.fromkeys(IDS, GOOD.digest())
    assert logged == [{"event": "ignored reply", "exchange": "one", "client": stranger}]
    assert len(each.ledger.entries) == 3


def test_a_good_reply_after_a_bad_one_is_ignored_too() -> None:
    def answer(request: Request) -> list[Reply]:
        return [Reply(request.client_id, error="no"), Reply(request.client_id, upload=GOOD.encode())]

    replies = cohort(Fake(answer=answer), terms=Terms(quorum=0.01)).ask
    with pytest.raises(QuorumError):
        replies(Toy.once, key="one")


def test_a_client_that_was_not_asked_cannot_answer() -> None:
    def answer(request: Request) -> list[Reply]:
        return [Reply(client_id, upload=GOOD.encode()) for client_id in IDS]

    assert list(cohort(Fake(answer=answer)).ask(Toy.once, {"b": Payload()}, key="one")) == ["b"]


def test_a_task_that_breaks_the_contract_stops_the_run() -> None:
    def answer(request: Request) -> Reply:
        return Reply(request.client_id, error="the task is wrong", breaks_contract=True)

    with pytest.raises(TaskError) as caught:
        cohort(Fake(answer=answer), terms=Terms(quorum=0.01)).ask(Toy.once, key="one")
    assert str(caught.value) == "the task is wrong"


# --- quorum


def test_below_the_quorum_the_run_stops_and_says_who_is_missing_and_why(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        with pytest.raises(QuorumError) as caught:
            cohort(Fake(answer=bad_for("b", None, "no\n  disk")), journal=journal).ask(Toy.once, key="one")
        assert str(caught.value) == (
            '2 of 3 clients answered the exchange "one", 3 are needed (b: no disk)\n'
            f"  where: {tmp_path}\n"
            "  fix:   mend the clients and run the same command again (what came is kept), or lower federation.quorum"
        )
        runtime = Fake(answer=bad_for("", None))
        replies = cohort(runtime, journal=journal).ask(Toy.once, key="one")
        assert list(replies) == IDS
        assert [request.client_id for request in runtime.asked] == ["b"]


@pytest.mark.parametrize(
    ("quorum", "needed"), [(1.0, 3), (0.67, 3), (2 / 3, 2), (0.5, 2), (1 / 3, 1), (0.01, 1), (0.0, 1)]
)
@pytest.mark.parametrize("answered", [0, 1, 2, 3])
@pytest.mark.parametrize("by_operator", [True, False])
def test_the_quorum(quorum: float, needed: int, answered: int, by_operator: bool) -> None:
    runtime = Fake(order=lambda replies: replies[:answered])
    each = cohort(runtime, terms=Terms(quorum=quorum if by_operator else 1.0))
    given = None if by_operator else quorum
    if answered >= needed:
        assert list(each.ask(Toy.once, key="one", quorum=given)) == IDS[:answered]
    else:
        with pytest.raises(QuorumError) as caught:
            each.ask(Toy.once, key="one", quorum=given)
        reasons = "; ".join(f"{client_id}: no reply" for client_id in IDS[answered:])
        assert caught.value.what == (
            f'{answered} of 3 clients answered the exchange "one", {needed} are needed ({reasons})'
        )
        assert caught.value.where == "memory"


def test_the_quorum_counts_those_that_were_asked() -> None:
    runtime = Fake(order=lambda replies: replies[:1])
    each = cohort(runtime)
    assert list(each.ask(Toy.once, {"a": Payload(), "b": Payload()}, key="one", quorum=0.5)) == ["a"]


# --- the journal


def test_a_question_that_was_answered_is_not_asked_again(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        first, second = cohort(journal=journal), Fake()
        wanted = bits(first.ask(Toy.once, key="one"))
        again = cohort(second, journal=journal)
        assert bits(again.ask(Toy.once, key="one")) == wanted
    with Journal(tmp_path / "j") as journal:
        assert bits(cohort(second, journal=journal).ask(Toy.once, key="one")) == wanted
    assert second.asked == []
    assert second.timeouts == []


def test_the_ledger_is_the_same_whether_clients_answered_or_the_journal() -> None:
    journal = Journal()
    runtime = Fake(answer=bad_for("", None))
    first, second = cohort(runtime, journal=journal), cohort(runtime, journal=journal)
    for each in (first, second):
        each.ask(Toy.once, Payload({"m": 1}), key="one")
    assert {entry.from_journal for entry in first.ledger.entries} == {False}
    assert {entry.from_journal for entry in second.ledger.entries} == {True}
    assert [replace(entry, from_journal=False) for entry in second.ledger.entries] == first.ledger.entries
    assert first.ledger.totals() == second.ledger.totals()
    assert first.ledger.peak_client_rss_bytes == second.ledger.peak_client_rss_bytes == 7
    assert first.uploads == second.uploads


@pytest.mark.parametrize(
    ("change", "asks"),
    [
        ({}, False),
        ({"method": Toy(unused=2)}, False),
        ({"method": Heir(extra=3)}, False),
        ({"method": Toy(used=2)}, True),
        ({"seed": 2}, True),
        ({"model_of": lambda client_id: ModelSpec({"kind": "none"}, 1, (2,), 2)}, True),
    ],
    ids=["same", "undeclared_setting", "heir", "declared_setting", "seed", "model"],
)
def test_only_what_can_change_the_answer_asks_anew(change: dict[str, Any], asks: bool) -> None:
    journal, runtime = Journal(), Fake()
    cohort(journal=journal).ask(Toy.once, key="one")
    cohort(runtime, journal=journal, **change).ask(Toy.once, key="one")
    assert bool(runtime.asked) is asks


@pytest.mark.parametrize(
    "facts", [ClientFacts("other"), ClientFacts("same", num_threads=2), ClientFacts("same", device="cuda")]
)
def test_other_data_threads_or_device_ask_anew(facts: ClientFacts) -> None:
    journal = Journal()
    same = Fake(facts=dict.fromkeys(IDS, ClientFacts("same")))
    cohort(same, journal=journal).ask(Toy.once, key="one")
    other = Fake(facts={**dict.fromkeys(IDS, ClientFacts("same")), "b": facts})
    cohort(other, journal=journal).ask(Toy.once, key="one")
    assert [request.client_id for request in other.asked] == ["b"]


def test_another_message_key_or_task_asks_anew() -> None:
    journal, runtime = Journal(), Fake()
    cohort(journal=journal).ask(Toy.once, key="one")
    for task, send, key in ((Toy.once, Payload({"m": 1}), "one"), (Toy.once, None, "two"), (Toy.count, None, "one")):
        cohort(runtime, journal=journal).ask(task, send, key=key)
    assert len(runtime.asked) == 9
    # An empty message is an empty message, whoever makes it.
    cohort(runtime, journal=journal).ask(Toy.once, Payload(), key="one")
    cohort(runtime, journal=journal).ask(Toy.once, dict.fromkeys(IDS, Payload()), key="one")
    assert len(runtime.asked) == 9


def test_a_damaged_answer_is_asked_for_again(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        first = cohort(journal=journal)
        wanted = bits(first.ask(Toy.once, key="one"))
        broken = journal.entries()[0]
    assert broken.path is not None
    broken.path.write_bytes(broken.path.read_bytes()[:-1])
    runtime = Fake()
    with Journal(tmp_path) as journal:
        assert bits(cohort(runtime, journal=journal).ask(Toy.once, key="one")) == wanted
        assert journal.broken == [broken.key]
    assert [request.client_id for request in runtime.asked] == [broken.facts["client"]]


def test_a_reply_is_kept_before_the_next_one_is_waited_for(tmp_path: Path) -> None:
    class Crash(Exception):
        pass

    def crash(replies: list[Reply]) -> Any:
        yield replies[0]
        raise Crash

    with Journal(tmp_path) as journal, pytest.raises(Crash):
        cohort(Fake(order=crash), journal=journal).ask(Toy.once, key="one")
    runtime = Fake()
    with Journal(tmp_path) as journal:
        continued = cohort(runtime, journal=journal).ask(Toy.once, key="one")
        assert bits(continued) == bits(cohort().ask(Toy.once, key="one"))
    assert [request.client_id for request in runtime.asked] == ["b", "c"]


def test_a_journal_that_cannot_be_written_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise JournalError("cannot write: No space left on device")

    monkeypatch.setattr("fedfuse.core.journal.write_atomically", full)
    with Journal(tmp_path) as journal, pytest.raises(JournalError):
        cohort(journal=journal, terms=Terms(quorum=0.01)).ask(Toy.once, key="one")


# --- state


def test_state_lasts_over_exchanges_and_over_a_crash(tmp_path: Path) -> None:
    def counts(runtime: Fake, keys: Sequence[str], journal: Journal) -> list[list[float]]:
        each = cohort(runtime, journal=journal)
        return [list(each.ask(Toy.count, key=key).numbers("count").values()) for key in keys]

    with Journal(tmp_path / "j") as journal:
        assert counts(Fake(sides(folder=tmp_path / "s")), ["one"], journal) == [[1, 1, 1]]
    # Another process continues: the first exchange comes from the journal, the second finds the state behind it.
    runtime = Fake(sides(folder=tmp_path / "s"))
    with Journal(tmp_path / "j") as journal:
        assert counts(runtime, ["one", "two"], journal) == [[1, 1, 1], [2, 2, 2]]
    assert [request.exchange for request in runtime.asked] == ["two"] * 3
    assert all(request.lineage for request in runtime.asked)
    again = Fake(sides(folder=tmp_path / "s"))
    with Journal(tmp_path / "j") as journal:
        assert counts(again, ["one", "two", "three"], journal) == [[1, 1, 1], [2, 2, 2], [3, 3, 3]]
    assert len(again.asked) == 3


def test_the_lineage_is_the_key_of_the_last_answer_that_kept_state() -> None:
    runtime = Fake()
    each = cohort(runtime)
    each.ask(Toy.count, key="one")
    each.ask(Toy.once, key="two")
    each.ask(Toy.count, {"a": Payload()}, key="three")
    each.ask(Toy.count, key="four")
    by_key = {(request.exchange, request.client_id): request for request in runtime.asked}
    assert by_key["one", "a"].lineage == by_key["two", "a"].lineage == ""
    assert by_key["three", "a"].lineage == by_key["one", "a"].answer_key
    assert by_key["four", "a"].lineage == by_key["three", "a"].answer_key
    assert by_key["four", "b"].lineage == by_key["one", "b"].answer_key


def test_another_past_is_another_question() -> None:
    journal = Journal()
    shared = sides()
    short, long = Fake(shared), Fake(shared)
    cohort(short, journal=journal).ask(Toy.count, key="two")
    each = cohort(long, journal=journal)
    each.ask(Toy.count, key="one")
    assert list(each.ask(Toy.count, key="two").numbers("count").values()) == [2, 2, 2]


def test_a_client_that_failed_keeps_the_state_that_it_had() -> None:
    runtime = Fake()
    each = cohort(runtime)
    each.ask(Toy.count, key="one")
    runtime.order = lambda replies: [replies[0], replace(replies[1], upload=None, error="late"), replies[2]]
    each.ask(Toy.count, key="two", quorum=0.5)
    runtime.order = list
    assert each.ask(Toy.count, key="three").numbers("count") == {"a": 3, "b": 2, "c": 3}


# --- what is told


def test_curves_are_logged_and_need_no_expectation() -> None:
    upload = Payload({**GOOD, "curve/loss": torch.tensor([2.0, 1.0]), "curve/last": 3})
    logged: list[Mapping[str, Any]] = []
    journal = Journal()
    for _ in range(2):
        logged.clear()
        cohort(Fake(answer=bad_for("b", upload)), journal=journal, log=logged.append).ask(
            Toy.once, key="one", expect=EXPECT
        )
        assert logged == [
            {"exchange": "one", "client": "b", "curve": "last", "values": [3]},
            {"exchange": "one", "client": "b", "curve": "loss", "values": [2.0, 1.0]},
        ]


def test_progress_counts_clients_and_their_own_work() -> None:
    told: list[tuple[Any, ...]] = []
    journal = Journal()
    cohort(journal=journal).ask(Toy.once, {"a": Payload()}, key="one")
    cohort(journal=journal, progress=lambda *facts: told.append(facts)).ask(Toy.once, key="one")
    assert told == [
        ("one", "a", 1, 3, 1.0),
        ("one", "", 1, 3, 0.0),
        ("one", "b", 1, 3, 0.5),
        ("one", "c", 1, 3, 0.5),
        ("one", "b", 2, 3, 1.0),
        ("one", "c", 3, 3, 1.0),
    ]


def test_waiting_is_measured() -> None:
    each = cohort()
    each.ask(Toy.once, key="one")
    first = each.waited_s
    each.ask(Toy.once, key="two")
    assert 0 < first < each.waited_s


def test_numbers_of_every_client() -> None:
    replies = cohort().ask(Toy.once, key="one")
    assert replies.numbers("n") == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert len(replies) == 3
    with pytest.raises(KeyError):
        replies.numbers("absent")


@pytest.mark.parametrize("client_id", ["", "../other", "a/b", ".hidden", "a b", "é", "a" * 101])
def test_an_id_that_is_no_name_of_a_file_is_refused(client_id: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_client_id(client_id)
    assert str(caught.value) == (
        f"{client_id!r:.60} is no client id\n  where: clients\n  fix:   use at most 100 letters, digits, _ . and -"
    )
    check_client_id("hospital-a_1.north")


# --- what comes late


def test_an_upload_that_comes_after_its_exchange_is_kept_for_whoever_asks_again() -> None:
    late: list[Reply] = []

    def answer(request: Request) -> Sequence[Reply]:
        reply = Reply(request.client_id, upload=GOOD.encode(), answer_key=request.answer_key)
        if request.client_id == "c" and request.exchange == "one":
            late.append(reply)
            return []
        # It arrives while another question is being answered.
        return [*late, reply] if request.exchange == "two" and request.client_id == "a" else [reply]

    runtime = Fake(answer=answer)
    lines: list[Mapping[str, Any]] = []
    each = cohort(runtime, terms=Terms(quorum=0.5), log=lines.append)
    assert each.ask(Toy.once, key="one").missing == {"c": "no reply"}
    assert list(each.ask(Toy.once, key="two")) == ["a", "b", "c"]
    assert each.late == {"c": ["one"]}
    assert {"event": "late reply", "exchange": "one", "client": "c"} in lines
    again = cohort(Fake(answer=lambda request: pytest.fail("asked again")), journal=each.journal)
    assert list(again.ask(Toy.once, key="one")) == ["a", "b", "c"]


@pytest.mark.parametrize("upload", [None, Payload({"undeclared": 1}).encode()])
def test_late_uploads_are_looked_for_at_the_end_and_checked_like_any_other(upload: bytes | None) -> None:
    runtime = Fake(answer=lambda request: [])
    each = cohort(runtime)
    with pytest.raises(QuorumError):
        each.ask(Toy.once, key="one")
    good, bad, strange = (
        Reply(client_id, upload=data, answer_key=runtime.asked[number].answer_key)
        for number, (client_id, data) in enumerate([("a", GOOD.encode()), ("b", upload), ("b", GOOD.encode())])
    )
    runtime.late_replies = lambda: [good, bad, strange]  # type: ignore[attr-defined]
    assert each.collect_late() == {"a": ["one"]}
    assert [entry.facts["client"] for entry in each.journal.entries()] == ["a"]
