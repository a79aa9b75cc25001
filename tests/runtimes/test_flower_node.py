"""A client on Flower: it computes once, sends nothing that its owner did not let go, and forgets nothing it needs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from flower_toys import NAME, PAYLOAD, WORKED, key_of, registered, toy_side
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedfuse.core.client import Request
from fedfuse.core.errors import DataError
from fedfuse.core.payload import Payload
from fedfuse.core.sealing import unseal
from fedfuse.runtimes.flower.codec import decode_message, encode_message, open_reply, request_header
from fedfuse.runtimes.flower.node import CHUNK, ENROL, NOTICE, TASK, Node
from flower_double import apps_of, node_of

AGREEMENT = b"agreed"
DIGEST = hashlib.sha256(AGREEMENT).hexdigest()


@pytest.fixture(autouse=True)
def _toy() -> Iterator[None]:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    with registered():
        yield


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return node_of(toy_side("a", tmp_path), tmp_path)


def tell(node: Node, kind: str, header: dict[str, Any], body: bytes = b"") -> tuple[dict[str, Any], bytes]:
    """What the node answers to a message."""
    (app,) = apps_of([node]).values()
    message = Message(encode_message(header, body), dst_node_id=1, message_type=kind)
    message.metadata.__dict__["_message_id"] = "m"
    reply = app(message, Context(1, 1, {}, RecordDict(), {}))
    return decode_message(reply.content, max_bytes=1 << 20)


def enrol(node: Node) -> dict[str, Any]:
    header, body = tell(node, ENROL, {"nonce": "n"}, AGREEMENT)
    assert header == {"kind": "card"}
    return dict(unseal(body, max_bytes=1 << 20).manifest)


def request(**changes: Any) -> Request:
    values = {"method": NAME, "settings": {}, "task": "work", "exchange": "first", "client_id": "a", "seed": 1}
    return Request(**{**values, "lineage": "", "answer_key": key_of(1), "payload": PAYLOAD, **changes})


def question(node: Node, asked: Request | None = None, **changes: Any) -> dict[str, Any]:
    facts = asdict(node.client_facts(node.side(AGREEMENT)))
    header = {"request": request_header(asked or request()), "agreement": DIGEST, "facts": facts}
    return {**header, "codec": "none", "chunk_bytes": 1 << 20, **changes}


def test_the_card_says_who_it_is_and_what_questions_are_made_from(node: Node) -> None:
    node = replace(node, facts=lambda side: {"site": "north"})
    card = enrol(node)
    side = node.side(AGREEMENT)
    assert card == {
        "kind": "card",
        "name": "a",
        "nonce": "n",
        "agreement": DIGEST,
        "fingerprint": node.key.blinded(side.data.fingerprint),
        "num_threads": 1,
        "device": "cpu",
        "num_examples": 3,
        "known": {"site": "north"},
    }
    bare = enrol(replace(node, blinds_fingerprint=False, tells_num_examples=False))
    assert (bare["fingerprint"], bare["num_examples"]) == (side.data.fingerprint, None)


def test_a_node_that_cannot_take_part_says_why(node: Node) -> None:
    def fails(agreement: bytes) -> Any:
        raise DataError("the labels do not fit", fix="look at them")

    said, body = tell(replace(node, side=fails), ENROL, {"nonce": "n"}, AGREEMENT)
    assert (said, body) == ({"kind": "failed", "reason": "the labels do not fit\n  fix:   look at them"}, b"")


def test_a_question_is_answered_once_and_the_answer_is_kept_sealed(node: Node) -> None:
    enrol(node)
    header, body = tell(node, TASK, question(node), PAYLOAD)
    assert header == {"kind": "answer"}
    asked = {"client_id": "a", "answer_key": key_of(1), "public_key": node.key.public_key}
    reply = open_reply(body, max_upload_bytes=1 << 20, **asked)
    assert reply.upload is not None
    assert Payload.decode(reply.upload)["n"] == 1
    # Another process of the same client: nothing is computed again, whatever its memory.
    again = node_of(toy_side("a", node.home), node.home)
    assert tell(again, TASK, question(again), PAYLOAD) == (header, body)
    assert len(WORKED) == 1


@pytest.mark.parametrize("damage", [b"", b"nonsense"])
def test_a_damaged_answer_is_made_again(node: Node, damage: bytes) -> None:
    enrol(node)
    _, body = tell(node, TASK, question(node), PAYLOAD)
    path = node.home / "answers" / f"{key_of(1)}.fed"
    path.write_bytes(damage)
    _, again = tell(node, TASK, question(node), PAYLOAD)
    upload, same = (unseal(data, max_bytes=1 << 20).part("upload") for data in (body, again))
    assert upload == same
    assert len(WORKED) == 2


def test_only_the_newest_answers_are_kept(node: Node) -> None:
    enrol(node)
    for number in range(7):
        tell(node, TASK, question(node, request(answer_key=key_of(number))), PAYLOAD)
    kept = sorted(path.name for path in (node.home / "answers").iterdir())
    assert kept == sorted(f"{key_of(number)}.{end}" for number in range(3, 7) for end in ("approved", "fed"))


def test_the_last_answer_is_kept_whatever_the_clock_says(node: Node) -> None:
    enrol(node)
    for number in range(6):
        tell(node, TASK, question(node, request(answer_key=key_of(number))), PAYLOAD)
        for path in (node.home / "answers").iterdir():
            # The clock was years ahead, and has jumped back since.
            os.utime(path, (4e9 - number, 4e9 - number))
    kept = {path.stem for path in (node.home / "answers").iterdir()}
    assert key_of(5) in kept
    assert len(kept) == 4


def test_a_request_to_somebody_else_is_not_carried_out(node: Node) -> None:
    enrol(node)
    said, _ = tell(node, TASK, question(node, request(client_id="b")), PAYLOAD)
    assert said == {"kind": "enrol me", "reason": "the request was not for a"}
    assert not WORKED


def test_without_the_agreement_it_asks_to_be_enrolled(node: Node) -> None:
    wanted = {"kind": "enrol me", "reason": "the client does not have the agreement"}
    assert tell(node, TASK, question(node), PAYLOAD)[0] == wanted
    enrol(node)
    (node.home / "agreements" / DIGEST).write_bytes(b"damaged")
    assert tell(node, TASK, question(node), PAYLOAD)[0] == wanted


def test_other_data_than_it_enrolled_with_give_no_answer(node: Node) -> None:
    enrol(node)
    header = question(node)
    changed = node_of(toy_side("a", node.home, value=7.0), node.home)
    said, _ = tell(changed, TASK, header, PAYLOAD)
    assert said["reason"].startswith("the client's data, threads or device are not those that it enrolled with")
    assert not WORKED


def test_nothing_leaves_that_the_owner_did_not_let_go(node: Node) -> None:
    seen: list[tuple[str, list[str]]] = []

    def approve(asked: Request, upload: bytes) -> str:
        seen.append((asked.exchange, list(Payload.decode(upload))))
        return "moments stay here" if len(seen) == 1 else ""

    node = replace(node, approve=approve)
    enrol(node)
    said, body = tell(node, TASK, question(node), PAYLOAD)
    assert said["kind"] == "failed"
    assert said["reason"] == "its owner did not let the upload go\n  where: client a\n  fix:   moments stay here"
    assert body == b""
    assert seen == [("first", ["n", "w/half", "w/x", "w/zero"])]
    piece = {"answer_key": key_of(1), "offset": 0, "num_bytes": 10, "codec": "none"}
    assert tell(node, CHUNK, piece) == ({"kind": "no answer"}, b"")
    # The owner changes their mind; what was computed is still there, and they are not asked a third time.
    assert tell(node, TASK, question(node), PAYLOAD)[0] == {"kind": "answer"}
    assert tell(node, TASK, question(node), PAYLOAD)[0] == {"kind": "answer"}
    assert (len(seen), len(WORKED)) == (2, 1)


def test_leave_for_one_upload_is_no_leave_for_another(node: Node) -> None:
    asked: list[str] = []
    node = replace(node, approve=lambda request, upload: asked.append(request.exchange) or "")  # type: ignore[func-returns-value]
    enrol(node)
    tell(node, TASK, question(node), PAYLOAD)
    (node.home / "answers" / f"{key_of(1)}.fed").unlink()
    # The server asks something else under the same key.
    tell(node, TASK, question(node, request(exchange="other")), PAYLOAD)
    assert asked == ["first", "other"]


def test_a_failing_task_is_told_and_not_kept(node: Node) -> None:
    enrol(node)
    header, body = tell(node, TASK, question(node, request(task="play")), PAYLOAD)
    reply = open_reply(
        body, client_id="a", answer_key=key_of(1), public_key=node.key.public_key, max_upload_bytes=1 << 20
    )
    assert (header, reply.upload, reply.error[:17]) == ({"kind": "answer"}, None, "KeyError: 'play' ")
    assert not (node.home / "answers").exists()


def test_a_large_answer_is_announced_and_handed_over_in_pieces(node: Node) -> None:
    enrol(node)
    said, body = tell(node, TASK, question(node, chunk_bytes=100), PAYLOAD)
    whole = (node.home / "answers" / f"{key_of(1)}.fed").read_bytes()
    assert said == {"kind": "stored", "num_bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
    assert body == b""
    terms = {"answer_key": key_of(1), "num_bytes": 100, "codec": "zlib"}
    pieces = [tell(node, CHUNK, {**terms, "offset": place}) for place in range(0, len(whole), 100)]
    assert {header["kind"] for header, _ in pieces} == {"piece"}
    assert b"".join(piece for _, piece in pieces) == whole


@pytest.mark.parametrize(
    ("kind", "header", "reason"),
    [
        (TASK, {}, 'the request has no proper "method"'),
        (TASK, {"request": 1}, 'the message has no table "request"'),
        (TASK, {"request": request_header(request(answer_key="../../etc"))}, "'../../etc' is no key of an answer"),
        (CHUNK, {"answer_key": "../key"}, "'../key' is no key of an answer"),
        (CHUNK, {}, 'the message has no text "answer_key"'),
        (ENROL, {}, 'the message has no text "nonce"'),
        (NOTICE, {"about": "over"}, 'the message has no text "text"'),
    ],
)
def test_messages_that_are_none_are_answered_with_words(
    node: Node, kind: str, header: dict[str, Any], reason: str
) -> None:
    said, _ = tell(node, kind, header, AGREEMENT)
    assert said["kind"] == "failed"
    assert said["reason"].splitlines()[0] == reason


def test_a_message_beyond_the_limit_is_refused(node: Node) -> None:
    said, _ = tell(replace(node, max_download_bytes=5), ENROL, {"nonce": "n"}, AGREEMENT)
    assert said["reason"].splitlines()[0] == "the message holds 6 bytes, more than the limit of 5"


def test_what_the_server_says_is_kept_for_the_owner(node: Node) -> None:
    heard: list[Any] = []
    node = replace(node, tell=heard.append)
    assert tell(node, NOTICE, {"about": "over", "text": "done"}) == ({"kind": "heard"}, b"")
    assert json.loads((node.home / "notice.json").read_text()) == {"about": "over", "text": "done"}
    assert heard == [{"event": "notice", "about": "over", "text": "done"}]


def test_the_owner_can_follow_what_happens(node: Node) -> None:
    heard: list[Any] = []
    node = replace(node, tell=lambda facts: heard.append(facts["event"]))
    enrol(node)
    tell(node, TASK, question(node), PAYLOAD)
    tell(node, TASK, question(node, request(answer_key=key_of(2), task="play")), PAYLOAD)
    assert heard == ["enrolled", "working", "answered", "working", "failed"]
