"""What crosses on Flower: any header and bytes come back; anything else ends in one clear error."""

from __future__ import annotations

import json
import tracemalloc
import zlib
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("flwr")

from flower_toys import PAYLOAD
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from fedfuse.core.client import Reply, Request
from fedfuse.core.errors import ConfigError, FedfuseError, SealError
from fedfuse.core.sealing import SigningKey, seal
from fedfuse.runtimes.flower.codec import (
    MessageError,
    check_codec,
    decode_message,
    encode_message,
    open_reply,
    plain_words,
    read_request,
    request_header,
    seal_reply,
    wire_bytes,
    with_header,
)
from flower_double import over_the_wire

KEY = SigningKey.generate()
REQUEST = Request("m", {"a": [1, {"b": None}]}, "t", "e", "c", 2**62, "", "f" * 40, PAYLOAD, {"name": "gaussian"})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def raw(facts: Any, data: bytes = b"") -> RecordDict:
    text = facts if isinstance(facts, str) else json.dumps(facts)
    array = Array(dtype="uint8", shape=(len(data),), stype="fedfuse.body", data=data)
    return RecordDict(
        {
            "fedfuse.header": ConfigRecord({"fedfuse.header": text}),
            "fedfuse.body": ArrayRecord({"fedfuse.body": array}),
        }
    )


def facts(**changes: Any) -> dict[str, Any]:
    return {"protocol": 1, "codec": "none", "num_bytes": 0, "header": {}, **changes}


@given(header=st.dictionaries(st.text(max_size=8), JSON, max_size=4), body=st.binary(max_size=300), zips=st.booleans())
def test_header_and_bytes_come_back(header: dict[str, Any], body: bytes, zips: bool) -> None:
    content = encode_message(header, body, codec="zlib" if zips else "none")
    assert decode_message(content, max_bytes=len(body)) == (header, body)


def test_a_large_body_survives_being_cut_into_pieces_by_flower() -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    body = bytes(range(256)) * 50_000  # more than two of Flower's pieces, and some of them alike
    message = Message(encode_message({"x": 1}, body), dst_node_id=1, message_type="query.x")
    message.metadata.__dict__["_message_id"] = "m"
    assert decode_message(over_the_wire(message).content, max_bytes=1 << 24) == ({"x": 1}, body)


def test_zlib_is_used_where_it_pays() -> None:
    zeros, noise = bytes(10_000), zlib.compress(bytes(range(256)) * 4, 9)
    assert wire_bytes(encode_message({}, zeros, codec="zlib")) < 500
    assert (
        json.loads(str(encode_message({}, noise, codec="zlib")["fedfuse.header"]["fedfuse.header"]))["codec"] == "none"
    )
    assert wire_bytes(encode_message({}, zeros)) > 10_000


def test_one_packed_body_serves_many_headers() -> None:
    packed = encode_message({}, b"body" * 100, codec="zlib")
    assert decode_message(with_header(packed, {"to": 2}), max_bytes=400) == ({"to": 2}, b"body" * 100)
    assert with_header(packed, {})["fedfuse.body"] is packed["fedfuse.body"]


def test_codecs() -> None:
    assert [check_codec("none"), check_codec("zlib")] == ["none", "zlib"]
    with pytest.raises(ConfigError) as error:
        check_codec("zlip")
    assert (error.value.what, error.value.fix) == ('there is no codec "zlip"', 'did you mean "zlib"? known: none, zlib')


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (RecordDict(), "this is no message of fedfuse"),
        (RecordDict({"fedfuse.header": ConfigRecord({"x": 1})}), "this is no message of fedfuse"),
        (raw("{"), "this is no message of fedfuse"),
        (raw("[" * 100_000), "this is no message of fedfuse"),
        (raw("[]"), "this is no message of fedfuse"),
        (raw(facts(header=1)), "this is no message of fedfuse"),
        (raw(facts(num_bytes="1")), "this is no message of fedfuse"),
        (raw(facts(header={"x": "y" * (1 << 20)})), "this is no message of fedfuse"),
        (raw(facts(protocol=2)), "the message speaks protocol 2, this version speaks 1"),
        (raw(facts(num_bytes=-1)), "the message announces -1 bytes and holds more"),
        (raw(facts(num_bytes=101)), "the message holds 101 bytes, more than the limit of 100"),
        (raw(facts(), b"x" * 101), "the message holds 101 bytes, more than the limit of 100"),
        (raw(facts(), b"x"), "the message announces 0 bytes and holds more"),
        (raw(facts(num_bytes=2), b"x"), "the message announces 2 bytes and holds fewer"),
        (raw(facts(codec="lzma")), "the message is packed by 'lzma', which this version does not know"),
        (raw(facts(codec="zlib", num_bytes=9), b"nonsense"), "the message cannot be unpacked: its bytes are damaged"),
        (
            raw(facts(codec="zlib", num_bytes=3), zlib.compress(b"abc")[:-1]),
            "the message cannot be unpacked: its bytes are damaged",
        ),
        (
            raw(facts(codec="zlib", num_bytes=3), zlib.compress(b"abc") + b"x"),
            "the message cannot be unpacked: its bytes are damaged",
        ),
        (raw(facts(codec="zlib", num_bytes=2), zlib.compress(b"abc")), "the message announces 2 bytes and holds more"),
    ],
)
def test_other_content_is_refused(content: RecordDict, what: str) -> None:
    with pytest.raises(MessageError) as error:
        decode_message(content, max_bytes=100)
    assert error.value.what == what


def test_a_bomb_is_refused_without_being_unpacked() -> None:
    bomb = zlib.compress(bytes(200 << 20), 9)
    tracemalloc.start()
    try:
        with pytest.raises(MessageError, match="announces 1,000 bytes and holds more"):
            decode_message(raw(facts(codec="zlib", num_bytes=1000), bomb), max_bytes=1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@given(text=st.text(max_size=60), data=st.binary(max_size=40), codec=st.sampled_from(["none", "zlib", 3]))
def test_any_content_ends_in_a_message_or_one_error(text: str, data: bytes, codec: Any) -> None:
    for content in (raw(text, data), raw(facts(codec=codec, num_bytes=len(text)), data)):
        try:
            decode_message(content, max_bytes=64)
        except MessageError:
            pass


def test_requests_come_back() -> None:
    header = json.loads(json.dumps(request_header(REQUEST)))
    assert read_request(header, PAYLOAD) == REQUEST


@pytest.mark.parametrize("field", list(request_header(REQUEST)))
@pytest.mark.parametrize("value", [None, True, [1]])
def test_a_request_with_a_wrong_field_is_refused(field: str, value: Any) -> None:
    with pytest.raises(MessageError) as error:
        read_request({**request_header(REQUEST), field: value}, PAYLOAD)
    assert error.value.what == f'the request has no proper "{field}"'


def test_a_request_that_says_more_is_refused() -> None:
    with pytest.raises(MessageError, match="the request says more than this version understands"):
        read_request({**request_header(REQUEST), "also": 1}, PAYLOAD)


ANSWER = Reply("c", upload=b"upload", seconds=1.5, peak_rss_bytes=7, answer_key="f" * 40)
ASKED: dict[str, Any] = {
    "client_id": "c",
    "answer_key": "f" * 40,
    "public_key": KEY.public_key,
    "max_upload_bytes": 100,
}


def test_replies_come_back() -> None:
    failed = replace(ANSWER, upload=None, error="no luck")
    assert open_reply(seal_reply(ANSWER, KEY), **ASKED) == ANSWER
    assert open_reply(seal_reply(failed, KEY), **ASKED) == failed
    # One client's word on the method must not stop everybody's run.
    assert open_reply(seal_reply(replace(failed, breaks_contract=True), KEY), **ASKED) == failed


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"client_id": "d"}, "the answer is in the name of 'c'"),
        ({"answer_key": "e" * 40}, "the answer belongs to another question"),
        ({"public_key": "0" * 64}, "the answer is signed by another key than the client's"),
    ],
)
def test_an_answer_counts_for_its_question_only(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(SealError) as error:
        open_reply(seal_reply(ANSWER, KEY), **{**ASKED, **changes})
    assert error.value.what == what


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"kind": "card"}, "the message is no answer"),
        ({"seconds": "1"}, "the answer does not say what it cost"),
        ({"seconds": float("inf")}, "the answer does not say what it cost"),
        ({"seconds": float("nan")}, "the answer does not say what it cost"),
        ({"peak_rss_bytes": None}, "the answer does not say what it cost"),
        ({"has_upload": False}, "the answer holds no upload and no reason"),
        ({"error": "but"}, "the answer holds no upload and no reason"),
        ({"sha256": "0" * 64}, "the upload is not the one that was sealed"),
    ],
)
def test_an_answer_that_contradicts_itself_is_refused(changes: dict[str, Any], what: str) -> None:
    from fedfuse.core.sealing import unseal

    manifest = unseal(seal_reply(ANSWER, KEY), max_bytes=10_000).manifest
    with pytest.raises(SealError) as error:
        open_reply(seal({**manifest, **changes}, {"upload": b"upload"}, KEY), **ASKED)
    assert error.value.what == what


def test_a_changed_byte_is_seen() -> None:
    data = seal_reply(ANSWER, KEY)
    for place in range(0, len(data), 7):
        changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        try:
            assert open_reply(changed, **ASKED) == ANSWER
        except FedfuseError:
            pass


def test_words_of_another_machine_are_made_fit_for_a_terminal() -> None:
    assert plain_words("a\x1b[31mb\nc\r\x07é") == "a[31mb\ncé"
    assert len(plain_words("x" * 5000)) == 2000
