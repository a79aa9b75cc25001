"""What crosses between server and clients on Flower: a small JSON header and a run of bytes, and nothing else.

Flower's own arrays are not used for tensors: they know no bfloat16, and a sealed payload is what gets verified.
Flower cuts the bytes of a large array into pieces by itself.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Literal, get_args

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedfuse.core.client import Reply, Request
from fedfuse.core.errors import ConfigError, FedfuseError, SealError, did_you_mean
from fedfuse.core.sealing import SigningKey, seal, unseal

Codec = Literal["none", "zlib"]
"""How the bytes of a message are compressed."""

PROTOCOL = 1
"""Raised when an older client could misunderstand a newer server."""

SLACK_BYTES = 1 << 20
"""What a sealed answer may be larger than the upload in it."""

_MAX_HEADER_BYTES = 1 << 20
_HEADER, _BODY = "fedfuse.header", "fedfuse.body"
_FIX = "use the same version of fedfuse on both sides"


class MessageError(FedfuseError):
    """A message of the federation is not what it must be."""


def check_codec(name: str) -> Codec:
    """Refuse a codec that is not known.

    Args:
        name: as in the configuration.

    Returns:
        The name.

    Raises:
        ConfigError: it is none.
    """
    for known in get_args(Codec):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise ConfigError(f'there is no codec "{name}"', where="codec", fix=did_you_mean(name, get_args(Codec)))


def encode_message(header: Mapping[str, Any], body: bytes = b"", *, codec: Codec = "none") -> RecordDict:
    """Turn a header and bytes into the content of a Flower message.

    Args:
        header: JSON; small.
        body: bytes of any length.
        codec: how to compress the body; bytes that do not get smaller are sent as they are.

    Returns:
        Content for :func:`decode_message`.
    """
    packed = zlib.compress(body, 1) if codec == "zlib" else body
    if len(packed) >= len(body):
        packed, codec = body, "none"
    facts = {"protocol": PROTOCOL, "codec": codec, "num_bytes": len(body), "header": dict(header)}
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    # The bytes stand in the array as they are: numpy's own file header would be one more thing to parse.
    array = Array(dtype="uint8", shape=(len(packed),), stype=_BODY, data=packed)
    return RecordDict({_HEADER: ConfigRecord({_HEADER: text}), _BODY: ArrayRecord({_BODY: array})})


def with_header(content: RecordDict, header: Mapping[str, Any]) -> RecordDict:
    """The same bytes under another header; one packed message serves many clients.

    Args:
        content: what :func:`encode_message` gave.
        header: JSON; small.
    """
    facts = json.loads(str(content.config_records[_HEADER][_HEADER]))
    text = json.dumps({**facts, "header": dict(header)}, sort_keys=True, separators=(",", ":"))
    return RecordDict({_HEADER: ConfigRecord({_HEADER: text}), _BODY: content.array_records[_BODY]})


def wire_bytes(content: RecordDict) -> int:
    """Bytes of a message as Flower is given it; what HTTP and TLS put around it is not counted.

    Args:
        content: of any message, also one that no fedfuse made.
    """
    total = 0
    for record in content.array_records.values():
        total += sum(len(array.data) for array in record.values())
    for table in content.config_records.values():
        total += sum(
            len(key) + len(value if isinstance(value, (str, bytes)) else str(value)) for key, value in table.items()
        )
    return total


def decode_message(content: RecordDict, *, max_bytes: int) -> tuple[dict[str, Any], bytes]:
    """Turn the content of a Flower message into its header and bytes.

    Args:
        content: of any message.
        max_bytes: larger bodies are refused before they are unpacked.

    Returns:
        Header and body.

    Raises:
        MessageError: the content is no message of fedfuse's, or too large.
    """
    try:
        text = content.config_records[_HEADER][_HEADER]
        arrays = content.array_records[_BODY]
        packed = arrays[_BODY].data
        if not isinstance(text, str) or len(text) > _MAX_HEADER_BYTES or len(content) != 2 or len(arrays) != 1:
            raise ValueError
        facts = json.loads(text)
        protocol, codec, num_bytes, header = (facts[key] for key in ("protocol", "codec", "num_bytes", "header"))
        if not isinstance(num_bytes, int) or not isinstance(header, dict) or not isinstance(packed, bytes):
            raise ValueError
    except (KeyError, ValueError, TypeError, RecursionError):
        raise MessageError("this is no message of fedfuse", fix=_FIX) from None
    if protocol != PROTOCOL:
        raise MessageError(f"the message speaks protocol {protocol!r:.20}, this version speaks {PROTOCOL}", fix=_FIX)
    if max(num_bytes, len(packed)) > max_bytes:
        raise MessageError(
            f"the message holds {max(num_bytes, len(packed)):,} bytes, more than the limit of {max_bytes:,}",
            fix="send less, or raise federation.max_upload_bytes",
        )
    return header, _unpack(packed, codec, num_bytes)


def _unpack(packed: bytes, codec: object, num_bytes: int) -> bytes:
    if codec == "none":
        body = packed
    elif codec == "zlib":
        stream = zlib.decompressobj()
        try:
            # One byte more than was announced is room enough to see that there is too much.
            body = stream.decompress(packed, max(1, num_bytes + 1))
        except zlib.error:
            raise MessageError("the message cannot be unpacked: its bytes are damaged", fix="send it again") from None
        if len(body) <= num_bytes and (not stream.eof or stream.unused_data):
            raise MessageError("the message cannot be unpacked: its bytes are damaged", fix="send it again")
    else:
        raise MessageError(f"the message is packed by {codec!r:.20}, which this version does not know", fix=_FIX)
    if len(body) != num_bytes:
        raise MessageError(
            f"the message announces {num_bytes:,} bytes and holds {'more' if len(body) > num_bytes else 'fewer'}",
            fix="send it again",
        )
    return body


def plain_words(text: str) -> str:
    """What another machine says, fit for a terminal and a log.

    Args:
        text: anything.

    Returns:
        At most 2,000 printable characters and line ends.
    """
    return "".join(letter for letter in text[:2000] if letter == "\n" or letter.isprintable())


def request_header(request: Request) -> dict[str, Any]:
    """All of a request but its payload, as JSON.

    Args:
        request: what is asked.
    """
    return {key: value for key, value in asdict(request).items() if key != "payload"}


def read_request(header: Mapping[str, Any], payload: bytes) -> Request:
    """The request of a header and a payload.

    Args:
        header: what :func:`request_header` gave.
        payload: the encoded message.

    Raises:
        MessageError: the header is no request's.
    """
    kinds = {"str": str, "int": int}
    values: dict[str, Any] = {}
    for field in fields(Request):
        if field.name == "payload":
            continue
        value = header.get(field.name)
        if not isinstance(value, kinds.get(str(field.type), Mapping)) or isinstance(value, bool):
            raise MessageError(f'the request has no proper "{field.name}"', fix=_FIX)
        values[field.name] = value
    if len(header) != len(values):
        raise MessageError("the request says more than this version understands", fix=_FIX)
    return Request(**values, payload=payload)


def seal_reply(reply: Reply, key: SigningKey) -> bytes:
    """A reply as the sealed container that crosses and that the client keeps.

    Args:
        reply: with or without an upload.
        key: the client's.
    """
    manifest = {
        "kind": "answer",
        "client_id": reply.client_id,
        "answer_key": reply.answer_key,
        "has_upload": reply.upload is not None,
        "sha256": "" if reply.upload is None else hashlib.sha256(reply.upload).hexdigest(),
        "error": reply.error,
        "breaks_contract": reply.breaks_contract,
        "seconds": reply.seconds,
        "peak_rss_bytes": reply.peak_rss_bytes,
    }
    return seal(manifest, {} if reply.upload is None else {"upload": reply.upload}, key)


def open_reply(data: bytes, *, client_id: str, answer_key: str, public_key: str, max_upload_bytes: int) -> Reply:
    """Verify a sealed reply against what was asked, and of whom.

    A client that says that the method breaks its contract is believed for itself only: the word of one client must not
    stop a federation.

    Args:
        data: what :func:`seal_reply` gave; any other bytes end in an error.
        client_id: who was asked.
        answer_key: the question.
        public_key: the client's.
        max_upload_bytes: larger uploads are refused.

    Returns:
        The reply.

    Raises:
        SealError: it is not that client's answer to that question.
    """
    sealed = unseal(data, max_bytes=max_upload_bytes + SLACK_BYTES)
    fix = "the client must join anew, with its own name and key"
    if sealed.public_key != public_key:
        raise SealError("the answer is signed by another key than the client's", where=f"client {client_id}", fix=fix)
    if sealed.text("kind") != "answer":
        raise SealError("the message is no answer", where=f"client {client_id}", fix=fix)
    if (name := sealed.text("client_id")) != client_id:
        raise SealError(f"the answer is in the name of {name!r:.60}", where=f"client {client_id}", fix=fix)
    if sealed.text("answer_key") != answer_key:
        raise SealError("the answer belongs to another question", where=f"client {client_id}", fix=fix)
    facts = sealed.manifest
    seconds, peak, error = facts.get("seconds"), facts.get("peak_rss_bytes"), sealed.text("error")
    if not isinstance(seconds, (int, float)) or not isinstance(peak, int) or not 0 <= seconds < float("inf"):
        raise SealError("the answer does not say what it cost", where=f"client {client_id}", fix=fix)
    upload = sealed.parts.get("upload")
    if (upload is not None) != (facts.get("has_upload") is True) or (upload is not None and error):
        raise SealError("the answer holds no upload and no reason", where=f"client {client_id}", fix=fix)
    if upload is not None and hashlib.sha256(upload).hexdigest() != sealed.text("sha256"):
        raise SealError("the upload is not the one that was sealed", where=f"client {client_id}", fix=fix)
    return Reply(
        client_id,
        upload=upload,
        error="" if upload is not None else plain_words(error) or "it gave no reason",
        seconds=float(seconds),
        peak_rss_bytes=max(0, peak),
        answer_key=answer_key,
    )
