"""The server on Flower: each answer counts once, for its question and its client, whatever comes over the grid."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest

pytest.importorskip("flwr")

from flower_toys import WORKED, Federation, Toy, key_of, no_progress, registered, toy_side
from flwr.app import Message
from flwr.common.constant import ErrorCode
from hypothesis import given
from hypothesis import strategies as st

from fedfuse.core.client import Reply
from fedfuse.core.cohort import Cohort
from fedfuse.core.errors import ConfigError, JournalError, QuorumError
from fedfuse.core.journal import Journal
from fedfuse.core.payload import Payload
from fedfuse.core.sealing import SigningKey
from fedfuse.runtimes.flower import enrolment, questions
from fedfuse.runtimes.flower.codec import decode_message, encode_message, seal_reply
from fedfuse.runtimes.flower.node import CHUNK, ENROL, TASK, Node
from fedfuse.runtimes.local import LocalRuntime
from flower_double import Fault, apps_of, failure, node_of


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(questions, "_PAUSE_S", 0.0)
    monkeypatch.setattr(enrolment, "_PAUSE_S", 0.0)
    with registered():
        yield


def on(kind: str, node_id: int, then: Callable[[Message, Message], Any], times: int = 1) -> Fault:
    """A fault that happens to the first messages of a kind to a node."""
    left = [times]

    def fault(question: Message, reply: Message) -> Any:
        meant = question.metadata.message_type == kind and question.metadata.dst_node_id == node_id
        if not meant or not left[0]:
            return None
        left[0] -= 1
        return then(question, reply)

    return fault


def instead(header: dict[str, Any], body: bytes = b"") -> Callable[[Message, Message], list[Message]]:
    """Another content comes back."""
    return lambda question, reply: [Message(encode_message(header, body), reply_to=question)]


def errors(replies: list[Reply]) -> dict[str, str]:
    return {reply.client_id: reply.error.splitlines()[0] for reply in replies if reply.upload is None}


def uploads(replies: list[Reply]) -> dict[str, bytes]:
    return {reply.client_id: reply.upload for reply in replies if reply.upload is not None}


def all_asked(found: Federation) -> list[Any]:
    return [found.request(name, key_of(number)) for number, name in enumerate(found.ids)]


def status(found: Federation) -> dict[str, Any]:
    return dict(json.loads((found.home / "server" / "status.json").read_text()))


def test_the_cohort_gets_what_it_gets_from_the_local_runtime(tmp_path: Path) -> None:
    found = Federation(tmp_path)
    cohort = found.cohort(found.server())
    first = cohort.ask(Toy.work, Payload({"name": "first"}), key="first")
    second = cohort.ask(Toy.work, Payload({"name": "second"}), key="second")
    plain = LocalRuntime({name: toy_side(name, tmp_path / "local") for name in found.ids}, workers=1)
    local = Cohort(runtime=plain, method=found.method, model_of=cohort._model_of, seed=1)
    for key, replies in (("first", first), ("second", second)):
        wanted = local.ask(Toy.work, Payload({"name": key}), key=key)
        assert [p.encode() for p in replies.values()] == [p.encode() for p in wanted.values()]
    assert [reply["n"] for reply in second.values()] == [2, 2, 2]
    for entry in cohort.ledger.entries:
        assert entry.upload_bytes < entry.upload_wire_bytes < entry.upload_bytes + 2500
        assert entry.download_bytes < entry.download_wire_bytes < entry.download_bytes + 2500


@pytest.mark.parametrize("settings", [{"codec": "zlib"}, {"chunk_bytes": 500}, {"chunk_bytes": 400, "codec": "zlib"}])
def test_codec_and_pieces_change_no_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    found, other = Federation(tmp_path / "plain"), Federation(tmp_path / "other", **settings)
    answers = []
    for federation in (found, other):
        runtime = federation.server()
        runtime.clients()
        answers.append(uploads(federation.ask(runtime, all_asked(federation))))
    assert answers[0] == answers[1]
    assert sorted(answers[0]) == ["a", "b", "c"]
    assert not list((other.home / "server").glob("incoming/*"))


def test_each_reply_is_yielded_when_it_comes(tmp_path: Path) -> None:
    found = Federation(tmp_path)
    runtime = found.server()
    runtime.clients()
    found.grid.frozen.add(found.node_ids["a"])
    replies = runtime.exchange(all_asked(found), timeout_s=None, progress=no_progress)
    assert [next(replies).client_id, next(replies).client_id] == ["b", "c"]
    found.grid.frozen.clear()
    assert [reply.client_id for reply in replies] == ["a"]


# Enrolment


def test_enrolment_waits_for_everybody_that_is_expected(tmp_path: Path) -> None:
    found = Federation(tmp_path)
    late = found.grid.apps.pop(found.node_ids["b"])
    looks: list[int] = []

    def nodes() -> list[int]:
        looks.append(1)
        if len(looks) == 5:
            found.grid.apps[found.node_ids["b"]] = late
        return list(found.grid.apps)

    found.grid.get_node_ids = nodes  # type: ignore[method-assign]
    facts = found.server().clients()
    assert list(facts) == ["a", "b", "c"]
    assert facts["a"].fingerprint == found.nodes["a"].client_facts(toy_side("a", tmp_path)).fingerprint
    assert facts["a"].num_examples == 3


def test_too_few_at_the_deadline_stop_the_run_and_say_who_is_missing(tmp_path: Path) -> None:
    found = Federation(tmp_path, deadline_s=0.05)
    del found.grid.apps[found.node_ids["b"]]
    with pytest.raises(QuorumError) as error:
        found.server().clients()
    assert str(error.value) == (
        "2 of 3 clients enrolled within 0.05 s, 3 are needed (missing: b)\n"
        f"  where: {tmp_path}/server/members.json\n"
        "  fix:   start the missing clients and run the same command again, or lower federation.quorum"
    )
    assert list(found.server(quorum=0.6).clients()) == ["a", "c"]


def test_without_names_the_first_that_come_take_part(tmp_path: Path) -> None:
    found = Federation(tmp_path, expected=(), num_clients=2)
    assert list(found.server().clients()) == ["a", "b"]
    (away,) = found.events("turned away")
    assert away["reason"].splitlines()[0] == "the federation has all its 2 clients"
    with pytest.raises(QuorumError, match=r"3 of 5 clients enrolled .* \(missing: 2 more\)"):
        found.server(num_clients=5, members=None, deadline_s=0.05).clients()


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"expected": ()}, "nobody is expected"),
        ({"chunk_bytes": 0}, "chunk_bytes is 0"),
        ({"codec": "xz"}, 'there is no codec "xz"'),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, settings: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError) as error:
        Federation(tmp_path, **settings).server()
    assert error.value.what == what


def stranger(found: Federation, name: str, folder: str = "stranger") -> tuple[int, Node]:
    """One more node, with a key of its own."""
    home = found.home / folder
    node = node_of(toy_side(name, home, 50.0), home)
    (app,) = apps_of([node]).values()
    node_id = 7 + len(found.grid.apps)
    found.grid.apps[node_id] = app
    return node_id, node


def notice(node: Node) -> dict[str, str]:
    return dict(json.loads((node.home / "notice.json").read_text()))


def test_a_name_that_is_not_expected_is_turned_away_and_told(tmp_path: Path) -> None:
    found = Federation(tmp_path)
    node_id, node = stranger(found, "mallory")
    runtime = found.server()
    assert list(runtime.clients()) == ["a", "b", "c"]
    assert len(found.ask(runtime, all_asked(found))) == 3
    words = 'no client "mallory" is expected\n  fix:   ask the server\'s operator to add the name to federation.clients'
    assert found.events("turned away") == [{"event": "turned away", "node": node_id, "reason": words}]
    assert notice(node) == {"about": "turned away", "text": words}
    runtime.close()
    assert [row["reason"] for row in status(found)["turned_away"]] == [words]


@pytest.mark.parametrize("trusts", ["the configured key", "the first key"])
def test_anothers_name_is_turned_away(tmp_path: Path, trusts: str) -> None:
    found = Federation(tmp_path)
    trusted = {"b": found.nodes["b"].key.public_key.upper()}
    if trusts == "the first key":
        trusted = {"b": ""}
        found.server().clients()
        # Made under another agreement, so that what is known of the members counts no longer; their keys do.
        path = tmp_path / "server" / "members.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "agreement": "another"}))
    found.grid.apps.pop(found.node_ids["b"])
    _, node = stranger(found, "b")
    runtime = found.server(trusted=trusted, deadline_s=0.05)
    with pytest.raises(QuorumError, match="missing: b"):
        runtime.clients()
    runtime.late_replies()
    assert notice(node)["text"].startswith(
        'the name "b" is another\'s: the key is not the one that the server knows for it\n'
    )


def test_of_two_nodes_with_one_name_the_first_works_until_it_goes(tmp_path: Path) -> None:
    found = Federation(tmp_path)
    twin = node_of(toy_side("a", tmp_path / "a"), tmp_path / "a")
    (app,) = apps_of([twin]).values()
    found.grid.apps[5] = app
    runtime = found.server()
    runtime.clients()
    first = [line["node"] for line in found.events("enrolled") if line["client"] == "a"]
    assert sorted(first) == [5, found.node_ids["a"]]
    found.ask(runtime, all_asked(found))
    asked = [m.metadata.dst_node_id for m in found.grid.sent if m.metadata.message_type == TASK]
    assert asked == [first[0], found.node_ids["b"], found.node_ids["c"]]
    found.grid.apps.pop(first[0])
    found.ask(runtime, [found.request("a", key_of(9))])
    assert found.grid.sent[-1].metadata.dst_node_id == first[1]


@pytest.mark.parametrize(
    ("header", "body", "reason"),
    [
        ({"kind": "card"}, b"nonsense", "the sealed message was refused: "),
        ({"kind": "failed", "reason": "no \x1bdata"}, b"", "it cannot take part\n  where: no data"),
        ({}, b"", "it cannot take part"),
    ],
)
def test_a_node_without_a_proper_card_is_turned_away(
    tmp_path: Path, header: dict[str, Any], body: bytes, reason: str
) -> None:
    found = Federation(tmp_path)
    found.grid.faults.append(on(ENROL, found.node_ids["b"], instead(header, body)))
    assert list(found.server(quorum=0.5, deadline_s=0.05).clients()) == ["a", "c"]
    assert found.events("turned away")[0]["reason"].startswith(reason)


def test_an_old_card_proves_nothing(tmp_path: Path) -> None:
    found = Federation(tmp_path)
    found.server().clients()
    # Someone recorded how b enrolled, and shows it again.
    old = next(m for m in found.grid.seen if m.metadata.src_node_id == found.node_ids["b"])
    _, body = decode_message(old.content, max_bytes=1 << 20)
    again = Federation(tmp_path, quorum=0.5, deadline_s=0.05, members=None)
    again.grid.faults.append(on(ENROL, again.node_ids["b"], instead({"kind": "card"}, body)))
    assert list(again.server().clients()) == ["a", "c"]
    assert again.events("turned away")[0]["reason"].startswith("its card is not valid: it answers another server")


def test_a_node_that_cannot_be_reached_at_first_is_greeted_again(tmp_path: Path) -> None:
    found = Federation(tmp_path)
    away = lambda question, reply: [failure(question, ErrorCode.NODE_UNAVAILABLE, "Node Unavailable")]  # noqa: E731
    found.grid.faults.append(on(ENROL, found.node_ids["b"], away, times=2))
    assert list(found.server().clients()) == ["a", "b", "c"]
    assert [line["reason"] for line in found.events("not enrolled")] == ["Node Unavailable"] * 2


def test_one_that_was_turned_away_is_heard_again_when_it_comes_anew(tmp_path: Path) -> None:
    found = Federation(tmp_path)
    found.grid.faults.append(on(ENROL, found.node_ids["b"], instead({"kind": "failed", "reason": "no data"})))
    runtime = found.server(quorum=0.5, deadline_s=0.02)
    assert list(runtime.clients()) == ["a", "c"]
    found.grid.activated[found.node_ids["b"]] = "later"
    runtime.late_replies()
    assert found.events("enrolled")[-1]["client"] == "b"


# Restart


def test_a_restarted_server_goes_on_while_clients_are_away(tmp_path: Path) -> None:
    found = Federation(tmp_path)
    journal = Journal(tmp_path / "journal")
    found.cohort(found.server(), journal).ask(Toy.work, Payload({"name": "first"}), key="first")
    apps = dict(found.grid.apps)
    found.grid.apps.clear()
    again = found.cohort(found.server(), journal).ask(Toy.work, Payload({"name": "first"}), key="first")
    assert list(again) == ["a", "b", "c"]
    assert len(WORKED) == 3
    found.grid.apps.update(apps)
    cohort = found.cohort(found.server(), journal)
    cohort.ask(Toy.work, Payload({"name": "first"}), key="first")
    assert list(cohort.ask(Toy.work, Payload({"name": "second"}), key="second")) == ["a", "b", "c"]
    journal.close()


def test_other_data_are_taken_in_at_a_start_and_refused_during_a_run(tmp_path: Path) -> None:
    found = Federation(tmp_path)
    runtime = found.server()
    before = runtime.clients()
    home = tmp_path / "b"
    found.grid.apps.pop(found.node_ids["b"])
    changed = node_of(toy_side("b", home, value=7.0), home)
    (found.grid.apps[99],) = apps_of([changed]).values()
    assert errors(found.ask(runtime, [found.request("b")], timeout_s=0.05)) == {}
    runtime.late_replies()
    assert notice(changed)["text"].startswith(
        'the data, threads or device of "b" are not those that it enrolled with\n'
    )
    after = found.server().clients()
    assert after["b"] != before["b"]
    assert after["a"] == before["a"]


def test_an_old_question_is_never_answered_from_other_data(tmp_path: Path) -> None:
    found = Federation(tmp_path)
    runtime = found.server()
    runtime.clients()
    found.grid.apps.pop(found.node_ids["b"])
    assert found.ask(runtime, [found.request("b")], timeout_s=0.02) == []
    home = tmp_path / "b"
    (found.grid.apps[99],) = apps_of([node_of(toy_side("b", home, value=7.0), home)]).values()
    runtime.clients()
    (reply,) = found.ask(runtime, [found.request("b")])
    assert reply.error.startswith("the client's data, threads or device are not those that it enrolled with")
    assert not WORKED


def test_a_damaged_list_of_members_says_so(tmp_path: Path) -> None:
    found = Federation(tmp_path)
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "members.json").write_text('{"keys": 1}')
    with pytest.raises(JournalError) as error:
        found.server()
    assert (error.value.what, error.value.fix) == (
        "the list of members cannot be read",
        "delete it: the clients enrol or contribute again, and the journal keeps what they sent",
    )


# Clients that come and go


@pytest.mark.parametrize("code", [ErrorCode.NODE_UNAVAILABLE, ErrorCode.CLIENT_APP_CRASHED])
def test_a_client_that_goes_is_asked_again(tmp_path: Path, code: int) -> None:
    found = Federation(tmp_path)
    runtime = found.server()
    runtime.clients()
    gone = lambda question, reply: [failure(question, code, "gone")]  # noqa: E731
    found.grid.faults.append(on(TASK, found.node_ids["b"], gone, times=2))
    assert sorted(uploads(found.ask(runtime, all_asked(found)))) == ["a", "b", "c"]
    assert [line["reason"] for line in found.events("asked again")] == ["gone", "gone"]
    # It had its answer ready: the work was done once.
    assert sorted(WORKED) == [("a", "first"), ("b", "first"), ("c", "first")]


def test_an_app_that_dies_every_time_costs_its_client(tmp_path: Path) -> None:
    found = Federation(tmp_path)
    runtime = found.server()
    runtime.clients()
    crash = lambda question, reply: [failure(question, ErrorCode.CLIENT_APP_CRASHED, "exit code -9")]  # noqa: E731
    found.grid.faults.append(on(TASK, found.node_ids["b"], crash, times=9))
    replies = found.ask(runtime, all_asked(found))
    assert errors(replies) == {"b": "the client's app failed: exit code -9"}
    assert len(found.events("asked again")) == 3


@pytest.mark.parametrize("returns_as", ["another node", "the same node"])
def test_a_client_that_was_killed_at_work_is_asked_when_it_is_back(tmp_path: Path, returns_as: str) -> None:
    found = Federation(tmp_path)
    runtime = found.server()
    runtime.clients()
    old = found.node_ids["b"]
    found.grid.frozen.add(old)
    replies = runtime.exchange(all_asked(found), timeout_s=None, progress=no_progress)
    assert [next(replies).client_id, next(replies).client_id] == ["a", "c"]
    if returns_as == "another node":
        (found.grid.apps[99],) = apps_of([found.nodes["b"]]).values()
        del found.grid.apps[old]
    else:
        # So soon that Flower never missed it; what it had been sent will not be answered.
        found.grid._waiting.clear()
        found.grid.activated[old] = "now"
        found.grid.frozen.clear()
    assert [reply.client_id for reply in replies] == ["b"]


def test_without_an_answer_at_the_deadline_the_client_is_missing(tmp_path: Path) -> None:
    found = Federation(tmp_path)
    runtime = found.server()
    runtime.clients()
    found.grid.frozen.add(found.node_ids["a"])
    found.grid.apps.pop(found.node_ids["b"])
    assert sorted(uploads(found.ask(runtime, all_asked(found), timeout_s=0.05))) == ["c"]
    clients = status(found)["clients"]
    assert clients["a"]["reason"] == "no answer within 0.05 s; it is at work at the end"
    assert clients["b"]["reason"] == "no answer within 0.05 s; it was not connected at the end"
    assert [clients[name]["state"] for name in "abc"] == ["missing", "missing", "answered"]
    assert runtime.outstanding == ["a", "b"]


def test_late_answers_are_taken_with_their_own_key(tmp_path: Path) -> None:
    found = Federation(tmp_path)
    runtime = found.server()
    runtime.clients()
    slow = found.node_ids["a"]
    found.grid.frozen.add(slow)
    assert len(found.ask(runtime, all_asked(found), timeout_s=0.02)) == 2
    assert runtime.late_replies() == []
    found.grid.frozen.clear()
    replies = found.ask(runtime, [found.request("b", key_of(9), exchange="second")])
    assert {(r.client_id, r.answer_key) for r in replies} == {("a", key_of(0)), ("b", key_of(9))}
    found.grid.frozen.add(slow)
    found.ask(runtime, [found.request("a", key_of(10))], timeout_s=0.02)
    found.grid.frozen.clear()
    (late,) = runtime.late_replies()
    assert (late.client_id, late.answer_key, late.upload is None) == ("a", key_of(10), False)
    assert runtime.outstanding == []


def test_the_cohort_journals_what_is_late(tmp_path: Path) -> None:
    found = Federation(tmp_path)
    runtime = found.server()
    cohort = found.cohort(runtime)
    found.grid.frozen.add(found.node_ids["a"])
    ask = {"quorum": 0.5, "timeout_s": 0.02}
    assert list(cohort.ask(Toy.work, Payload({"name": "x"}), key="x", **ask)) == ["b", "c"]
    found.grid.frozen.clear()
    assert cohort.collect_late() == {"a": ["x"]}
    again = found.cohort(runtime, cohort.journal).ask(Toy.work, Payload({"name": "x"}), key="x")
    assert list(again) == ["a", "b", "c"]
    assert len(WORKED) == 3


def test_a_question_that_is_still_open_is_not_asked_twice(tmp_path: Path) -> None:
    found = Federation(tmp_path)
    runtime = found.server()
    runtime.clients()
    found.grid.frozen.add(found.node_ids["a"])
    found.ask(runtime, [found.request("a")], timeout_s=0.02)
    found.grid.frozen.clear()
    assert len(found.ask(runtime, [found.request("a")])) == 1
    assert len([m for m in found.grid.sent if m.metadata.message_type == TASK]) == 1


def test_a_reader_that_stops_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    found = Federation(tmp_path)
    runtime = found.server()
    runtime.clients()
    replies = runtime.exchange(all_asked(found), timeout_s=None, progress=no_progress)
    first = next(replies)
    replies.close()  # type: ignore[attr-defined]
    rest = [request for request in all_asked(found) if request.client_id != first.client_id]
    assert sorted(uploads(found.ask(runtime, rest))) == sorted(request.client_id for request in rest)


# What must not count


def forged(found: Federation, name: str, key: SigningKey, **changes: Any) -> Callable[[Message, Message], Any]:
    """A well-formed answer that is not the client's, or not to the question."""
    reply = Reply(name, upload=Payload({"n": 9}).encode(), answer_key=key_of(1))
    return instead({"kind": "answer"}, seal_reply(replace(reply, **changes), key))


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("garbage", "the sealed message was refused: the bytes are not a payload"),
        ("empty", "the reply says nothing that was asked for"),
        ("another name", "the answer is in the name of 'a'"),
        ("another key", "the answer is signed by another key than the client's"),
        ("an old run", "the answer belongs to another question"),
        ("huge", "the message holds 2,000,000 bytes, more than the limit of 1,900,000"),
        ("huge, announced", "the answer has 10,000,000,000 bytes, more than the limit of 851,424"),
        ("odd path", "the reply announces an answer without saying which"),
        ("a piece", "the reply says nothing that was asked for"),
        ("no upload", "it gave no reason"),
    ],
)
def test_a_false_answer_costs_only_its_client(tmp_path: Path, what: str, error: str) -> None:
    found = Federation(tmp_path, max_upload_bytes=1_900_000 - (1 << 20))
    runtime = found.server()
    runtime.clients()
    own = found.nodes["b"].key
    false = {
        "garbage": instead({"kind": "answer"}, b"nonsense" * 10),
        "empty": instead({}),
        "another name": forged(found, "a", own),
        "another key": forged(found, "b", found.nodes["a"].key),
        "an old run": forged(found, "b", own, answer_key=key_of(77)),
        "huge": instead({"kind": "answer"}, bytes(2_000_000)),
        "huge, announced": instead({"kind": "stored", "num_bytes": 10**10, "sha256": "0" * 64}),
        "odd path": instead({"kind": "stored", "num_bytes": 10, "sha256": "../../../" + "0" * 55}),
        "a piece": instead({"kind": "piece"}, b"x"),
        "no upload": forged(found, "b", own, upload=None),
    }[what]
    found.grid.faults.append(on(TASK, found.node_ids["b"], false))
    replies = found.ask(runtime, all_asked(found))
    assert sorted(uploads(replies)) == ["a", "c"]
    assert errors(replies)["b"].startswith(error)
    assert status(found)["clients"]["b"]["state"] == "missing"


def test_a_failing_task_and_a_broken_contract_cost_one_client(tmp_path: Path) -> None:
    for mode, error in (("fails", "ZeroDivisionError: no luck"), ("breaks", 'the task "work" uploads "secret"')):
        found = Federation(tmp_path / mode, mode=mode)
        runtime = found.server()
        runtime.clients()
        replies = found.ask(runtime, all_asked(found))
        assert errors(replies)["b"].startswith(error)
        assert not any(reply.breaks_contract for reply in replies)


def test_an_answer_that_comes_twice_counts_once(tmp_path: Path) -> None:
    found = Federation(tmp_path)
    runtime = found.server()
    runtime.clients()
    found.grid.faults.append(on(TASK, found.node_ids["b"], lambda question, reply: [reply, reply]))
    assert [reply.client_id for reply in found.ask(runtime, all_asked(found))] == ["a", "b", "c"]
    assert found.events("ignored reply") == [
        {"event": "ignored reply", "node": found.node_ids["b"], "reason": "unasked"}
    ]


def test_the_first_of_two_nodes_to_answer_counts(tmp_path: Path) -> None:
    found = Federation(tmp_path)
    runtime = found.server()
    runtime.clients()
    old = found.node_ids["b"]
    app = found.grid.apps[old]
    found.grid.frozen.add(old)
    replies = runtime.exchange([found.request("b")], timeout_s=None, progress=no_progress)
    runtime._is_quiet = False

    def swap() -> None:
        (found.grid.apps[99],) = apps_of([found.nodes["b"]]).values()
        del found.grid.apps[old]

    def nodes() -> list[int]:
        if old in found.grid.apps and any(m.metadata.message_type == TASK for m in found.grid.sent):
            swap()
        return list(found.grid.apps)

    found.grid.get_node_ids = nodes  # type: ignore[method-assign]
    assert [reply.client_id for reply in replies] == ["b"]
    # The one that was thought dead answers after all.
    found.grid.apps[old] = app
    found.grid.frozen.clear()
    assert runtime.late_replies() == []
    assert found.events("ignored reply")[-1] == {
        "event": "ignored reply",
        "client": "b",
        "exchange": "first",
        "reason": "answered",
    }


def test_a_node_that_lost_its_home_is_enrolled_anew(tmp_path: Path) -> None:
    found = Federation(tmp_path)
    runtime = found.server()
    runtime.clients()
    for path in (tmp_path / "b" / "agreements").iterdir():
        path.unlink()
    assert sorted(uploads(found.ask(runtime, all_asked(found)))) == ["a", "b", "c"]
    assert found.events("asked again")[0]["reason"] == "the client does not have the agreement"


# Pieces


def test_pieces_that_are_there_are_not_fetched_again_after_a_restart(tmp_path: Path) -> None:
    found = Federation(tmp_path, chunk_bytes=100)
    runtime = found.server()
    runtime.clients()
    calls: list[int] = []

    def dies(client_id: str, done: int, total: int) -> None:
        calls.append(done)
        if done >= 500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(runtime.exchange([found.request("b")], timeout_s=None, progress=dies))
    assert calls == [0, 100, 200, 300, 400, 500]
    folder = tmp_path / "server" / "incoming" / ("0" * 40)
    assert len(list(folder.glob("*.part"))) == 5
    (folder / "of-another-answer.part").write_bytes(b"x")
    again = found.server()
    again.clients()
    offsets: list[int] = []
    found.grid.faults.append(on(CHUNK, found.node_ids["b"], lambda q, r: offsets.append(_offset(q)), times=1000))
    (reply,) = found.ask(again, [found.request("b")])
    assert reply.upload is not None
    assert offsets[0] == 500
    assert offsets == sorted(set(offsets))
    assert not folder.exists()
    assert len(WORKED) == 1


def _offset(question: Message) -> int:
    return int(decode_message(question.content, max_bytes=0)[0]["offset"])


def test_pieces_wait_until_the_answer_is_written_down(tmp_path: Path) -> None:
    found = Federation(tmp_path, chunk_bytes=500)
    runtime = found.server()
    runtime.clients()
    replies = runtime.exchange([found.request("b")], timeout_s=None, progress=no_progress)
    next(replies)
    folder = tmp_path / "server" / "incoming" / ("0" * 40)
    assert folder.exists()
    assert list(replies) == []
    assert not folder.exists()


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("changed", "the pieces do not make the answer that was announced"),
        ("short", "a piece of the answer has 3 bytes, not 100"),
    ],
)
@pytest.mark.parametrize("remembers", [True, False])
def test_false_pieces_cost_only_their_client(tmp_path: Path, what: str, error: str, remembers: bool) -> None:
    found = Federation(tmp_path, chunk_bytes=100)
    runtime = found.server(**({} if remembers else {"members": None}))
    runtime.clients()
    piece = bytes(100) if what == "changed" else b"abc"
    found.grid.faults.append(on(CHUNK, found.node_ids["b"], instead({"kind": "piece"}, piece)))
    replies = found.ask(runtime, all_asked(found))
    assert errors(replies) == {"b": error}
    assert sorted(uploads(replies)) == ["a", "c"]


def test_a_client_that_lost_its_answer_between_pieces_makes_it_again(tmp_path: Path) -> None:
    found = Federation(tmp_path, chunk_bytes=300)
    runtime = found.server()
    runtime.clients()

    def loses(question: Message, reply: Message) -> Any:
        for path in (tmp_path / "b" / "answers").iterdir():
            path.unlink()
        return instead({"kind": "no answer"})(question, reply)

    found.grid.faults.append(on(CHUNK, found.node_ids["b"], loses))
    assert sorted(uploads(found.ask(runtime, all_asked(found)))) == ["a", "b", "c"]
    assert WORKED.count(("b", "first")) == 2


def test_a_cut_between_pieces_costs_one_piece(tmp_path: Path) -> None:
    found = Federation(tmp_path, chunk_bytes=300)
    runtime = found.server()
    runtime.clients()
    cut = lambda question, reply: [failure(question, ErrorCode.NODE_UNAVAILABLE, "cut")]  # noqa: E731
    found.grid.faults.append(on(CHUNK, found.node_ids["b"], cut))
    (reply,) = found.ask(runtime, [found.request("b")])
    assert reply.upload is not None
    offsets = [_offset(m) for m in found.grid.sent if m.metadata.message_type == CHUNK]
    assert offsets[0] == offsets[1] == 0
    assert offsets[1:] == sorted(set(offsets))


# Status and the end


def test_status_says_who_has_sent_what(tmp_path: Path) -> None:
    found = Federation(tmp_path)
    runtime = found.server()
    start = time.time()
    runtime.clients()
    before = status(found)["clients"]["a"]
    assert (before["state"], before["is_online"], before["exchange"]) == ("enrolled", True, "")
    assert start <= before["enrolled_at"] <= before["last_seen"] <= time.time()
    del found.grid.apps[found.node_ids["b"]]
    found.ask(runtime, all_asked(found), timeout_s=0.02)
    after = status(found)
    assert after["exchange"] == "first"
    assert (after["clients"]["a"]["state"], after["clients"]["b"]["is_online"]) == ("answered", False)
    assert after["clients"]["a"]["upload_wire_bytes"] > before["upload_wire_bytes"] > 0
    runtime.close()
    runtime.close()
    again = found.server()
    again.close()
    assert status(found)["clients"]["b"]["state"] == "enrolled"


def test_all_nodes_hear_the_end(tmp_path: Path) -> None:
    found = Federation(tmp_path)
    runtime = found.server()
    runtime.clients()
    found.grid.frozen.add(found.node_ids["c"])
    runtime.dismiss("thank you", patience_s=0.3)
    assert [notice(found.nodes[name]) for name in "ab"] == [{"about": "over", "text": "thank you"}] * 2
    assert not (tmp_path / "c" / "notice.json").exists()


FAULTS: dict[str, Callable[[Message, Message], Any]] = {
    "gone": lambda question, reply: [failure(question, ErrorCode.NODE_UNAVAILABLE, "Node Unavailable")],
    "crashed": lambda question, reply: [failure(question, ErrorCode.CLIENT_APP_CRASHED, "exit code -9")],
    "expired": lambda question, reply: [failure(question, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "expired")],
    "twice": lambda question, reply: [reply, reply],
    "none": lambda question, reply: None,
}


@hypothesis.settings(max_examples=12)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(sorted(FAULTS))), max_size=8), st.booleans())
def test_whatever_happens_on_the_way_the_answers_are_the_same(faults: list[tuple[str, str]], in_pieces: bool) -> None:
    hypothesis.assume(all(faults.count((name, "crashed")) < 3 for name in "abc"))
    answers = []
    for disturbances in ([], faults):
        with tempfile.TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patch:
            patch.setattr("os.fsync", lambda descriptor: None)
            found = Federation(Path(home), chunk_bytes=700 if in_pieces else 1 << 20)
            runtime = found.server()
            runtime.clients()
            for name, fault in disturbances:
                found.grid.faults.append(on(TASK, found.node_ids[name], FAULTS[fault]))
            replies = found.ask(runtime, all_asked(found))
            assert [reply.error for reply in replies] == ["", "", ""]
            answers.append(uploads(replies))
    assert answers[0] == answers[1]


def test_two_hundred_clients_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two hundred clients on one disk would wait for it most of the time.
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    names = [f"c{number:03}" for number in range(200)]
    found = Federation(tmp_path, ids=names)
    runtime = found.server()
    assert list(runtime.clients()) == names
    assert sorted(uploads(found.ask(runtime, all_asked(found)))) == names


@pytest.mark.parametrize("num_lost", [1, 3])
def test_an_answer_that_got_lost_on_its_way_is_asked_for_again(
    num_lost: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "_PATIENCE_S", 0.001)
    found = Federation(tmp_path)
    runtime = found.server()
    runtime.clients()
    found.grid.faults.append(on(TASK, found.node_ids["b"], lambda question, reply: [], times=num_lost))
    replies = found.ask(runtime, all_asked(found))
    assert sorted(uploads(replies)) == found.ids
    # Asked several times, worked on once.
    assert sorted(WORKED) == [(name, "first") for name in found.ids]
    assert sum(message.metadata.message_type == TASK for message in found.grid.sent) >= 3 + num_lost


def test_a_greeting_that_got_lost_on_its_way_is_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedfuse.runtimes.flower.enrolment._PATIENCE_S", 0.2)
    monkeypatch.setattr("fedfuse.runtimes.flower.enrolment._PAUSE_S", 0.1)
    found = Federation(tmp_path)
    found.grid.faults.append(on(ENROL, found.node_ids["b"], lambda question, reply: [], times=2))
    assert list(found.server().clients()) == found.ids
