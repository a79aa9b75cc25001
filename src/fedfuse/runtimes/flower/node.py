"""A client's side on Flower: a ClientApp that enrols, carries out tasks and hands over large answers in pieces.

Flower starts a process per message, so nothing here lives in memory from one message to the next: what must last is a
file in the node's home, written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedfuse.core.client import ClientSide, Reply, Request, perform
from fedfuse.core.cohort import ClientFacts
from fedfuse.core.errors import FedfuseError
from fedfuse.core.files import write_atomically
from fedfuse.core.sealing import SigningKey, seal
from fedfuse.runtimes.flower.codec import (
    SLACK_BYTES,
    MessageError,
    check_codec,
    decode_message,
    encode_message,
    open_reply,
    read_request,
    seal_reply,
)
from fedfuse.runtimes.flower.secagg_client import MASK, SETUP, SHARE, UNMASK, SumClient

ENROL, TASK, CHUNK, NOTICE = "query.enrol", "train.task", "query.chunk", "query.notice"
"""Types of the messages that a node answers."""

_KEPT_ANSWERS = 4
_KEPT_AGREEMENTS = 4


def _lets_go(request: Request, upload: bytes) -> str:
    return ""


def _nothing_more(side: ClientSide) -> Mapping[str, Any]:
    return {}


def _silent(facts: Mapping[str, Any]) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Node:
    """What one client brings to a federation on Flower.

    Args:
        name: the client's name in the federation.
        key: signs all that it says.
        home: folder for what must outlive a process; nobody else's.
        side: makes the client's machine from the bytes of an agreement.
        approve: looks at an upload before anything of it is sent; empty to let it go, else the owner's reason.
        tells_num_examples: let the server know how many examples the client trains on.
        facts: what else the owner lets the server know of the client; small JSON.
        blinds_fingerprint: show the server a digest that only this client can make instead of the fingerprint of its
            data, by which guesses of the data could be checked.
        tell: hears what happens, as a table with ``event``, for the owner to read.
        progress: called with (done, total) during a task.
        max_download_bytes: larger messages are refused.
        only_sums: whether uploads leave only masked, to be added up unseen; other questions are refused.
    """

    name: str
    key: SigningKey
    home: Path
    side: Callable[[bytes], ClientSide]
    approve: Callable[[Request, bytes], str] = _lets_go
    tells_num_examples: bool = True
    facts: Callable[[ClientSide], Mapping[str, Any]] = _nothing_more
    blinds_fingerprint: bool = True
    tell: Callable[[Mapping[str, Any]], None] = _silent
    progress: Callable[[int, int], None] = lambda done, total: None
    max_download_bytes: int = 4 << 30
    only_sums: bool = False

    def client_facts(self, side: ClientSide) -> ClientFacts:
        """What the server makes its questions from.

        Args:
            side: the client's machine.
        """
        fingerprint = side.data.fingerprint
        if self.blinds_fingerprint:
            fingerprint = self.key.blinded(fingerprint)
        # Where uploads are hidden in a sum, their weights are hidden too.
        num_examples = len(side.data.train) if self.tells_num_examples and not self.only_sums else None
        return ClientFacts(fingerprint, side.num_threads, side.device.type, num_examples)


def build_client_app(open_node: Callable[[Context], Node]) -> ClientApp:
    """A Flower ClientApp for a node.

    Args:
        open_node: makes the node that this process serves from Flower's context.

    Returns:
        The app.
    """
    app = ClientApp()

    def answer(
        handle: Callable[[Node, dict[str, Any], bytes], RecordDict], message: Message, context: Context
    ) -> Message:
        try:
            node = open_node(context)
            header, body = decode_message(message.content, max_bytes=node.max_download_bytes)
            content = handle(node, header, body)
        except Exception as error:  # whatever it is, it must reach the server as words, not as a dead process
            reason = str(error) if isinstance(error, FedfuseError) else f"{type(error).__name__}: {error}"
            content = encode_message({"kind": "failed", "reason": reason[:2000]})
        return Message(content, reply_to=message)

    app.query(ENROL.partition(".")[2])(partial(answer, _enrol))
    app.train(TASK.partition(".")[2])(partial(answer, _carry_out))
    app.query(CHUNK.partition(".")[2])(partial(answer, _hand_over))
    app.query(NOTICE.partition(".")[2])(partial(answer, _notice))
    app.train(SETUP.partition(".")[2])(partial(answer, _begin_sum))
    for stage in (SHARE, MASK, UNMASK):
        app.query(stage.partition(".")[2])(partial(answer, partial(_go_on_with_sum, stage)))
    return app


def _enrol(node: Node, header: dict[str, Any], body: bytes) -> RecordDict:
    """Keep the agreement and show who this is."""
    nonce, digest = _text(header, "nonce"), hashlib.sha256(body).hexdigest()
    side = node.side(body)
    folder = node.home / "agreements"
    write_atomically(folder / digest, body)
    _keep_newest(folder / digest, _KEPT_AGREEMENTS)
    manifest = {
        "kind": "card",
        "name": node.name,
        "nonce": nonce,
        "agreement": digest,
        **asdict(node.client_facts(side)),
        "known": dict(node.facts(side)),
    }
    node.tell({"event": "enrolled", "agreement": digest, "num_bytes": len(body)})
    return encode_message({"kind": "card"}, seal(manifest, {}, node.key))


def _carry_out(node: Node, header: dict[str, Any], body: bytes) -> RecordDict:
    """Answer a question: from the folder of answers if it was answered before."""
    table = header.get("request", {})
    if not isinstance(table, dict):
        raise MessageError('the message has no table "request"', fix="use the same version on both sides")
    request = read_request(table, body)
    if node.only_sums:
        raise FedfuseError(
            "its owner lets uploads go only where they are added up unseen",
            where=f"client {node.name}",
            fix="set federation.secure_aggregation",
        )
    reply = _finished(node, header, request)
    if isinstance(reply, RecordDict):
        return reply
    if reply.upload is None:
        return encode_message({"kind": "answer"}, seal_reply(reply, node.key))
    path = _answer_path(node, request.answer_key)
    _let_go(node, request, reply.upload, _marks(node, path)[0])
    node.tell({"event": "answered", "exchange": request.exchange, "num_bytes": len(reply.upload)})
    return _answer(node, header, path)


def _begin_sum(node: Node, header: dict[str, Any], body: bytes) -> RecordDict:
    """Answer a question for a secure sum: the answer stays here, and leaves masked in a later stage."""
    table = header.get("request", {})
    if not isinstance(table, dict):
        raise MessageError('the message has no table "request"', fix="use the same version on both sides")
    request = read_request(table, body)
    reply = _finished(node, header, request)
    if isinstance(reply, RecordDict):
        return reply
    if reply.upload is not None:
        _let_go(node, request, reply.upload, _marks(node, _answer_path(node, request.answer_key))[1])
    sealed = SumClient(node.name, node.key, node.home).set_up(header, reply)
    return encode_message({"kind": "sum"}, sealed)


def _go_on_with_sum(stage: str, node: Node, header: dict[str, Any], body: bytes) -> RecordDict:
    """A later stage of a secure sum."""
    client = SumClient(node.name, node.key, node.home)
    stages = {SHARE: client.share, MASK: client.mask, UNMASK: client.unmask}
    sealed = stages[stage](header, body)
    if stage == UNMASK:
        node.tell({"event": "answered", "exchange": "secure sum", "num_bytes": len(sealed)})
    return encode_message({"kind": "sum"}, sealed)


def _finished(node: Node, header: Mapping[str, Any], request: Request) -> Reply | RecordDict:
    """The answer to a question, computed if it was not before; or what the server must do first."""
    if request.client_id != node.name:
        return encode_message({"kind": "enrol me", "reason": f"the request was not for {node.name}"})
    path = _answer_path(node, request.answer_key)
    kept = _kept_reply(node, path, request.answer_key)
    if kept is not None:
        return kept
    agreement = _kept_agreement(node, header)
    if agreement is None:
        return encode_message({"kind": "enrol me", "reason": "the client does not have the agreement"})
    side = node.side(agreement)
    if asdict(node.client_facts(side)) != header.get("facts"):
        raise MessageError(
            "the client's data, threads or device are not those that it enrolled with",
            fix="join with the same data, or start the server's command again to take in the new ones",
        )
    node.tell({"event": "working", "exchange": request.exchange, "task": request.task})
    reply = perform(request, side, node.progress)
    if reply.upload is None:
        node.tell({"event": "failed", "exchange": request.exchange, "reason": reply.error})
        return reply
    # What the owner let go was another upload, even if it had the same name.
    for mark in _marks(node, path):
        mark.unlink(missing_ok=True)
    write_atomically(path, seal_reply(reply, node.key))
    _keep_newest(path, _KEPT_ANSWERS)
    return reply


def _marks(node: Node, path: Path) -> tuple[Path, Path]:
    """Marks of the owner's leave: to go as it is, and to go masked; the one is not the other."""
    return path.with_suffix(".approved"), node.home / "secagg" / "approved" / path.stem


def _let_go(node: Node, request: Request, upload: bytes, mark: Path) -> None:
    """Ask the owner once whether an upload may leave."""
    if mark.exists():
        return
    reason = node.approve(request, upload)
    if reason:
        node.tell({"event": "refused", "exchange": request.exchange, "reason": reason})
        raise FedfuseError("its owner did not let the upload go", where=f"client {node.name}", fix=reason)
    write_atomically(mark, b"")


def _answer(node: Node, header: Mapping[str, Any], path: Path) -> RecordDict:
    """A sealed answer that fits into one message, or what there is to fetch."""
    num_bytes, limit = path.stat().st_size, _count(header, "chunk_bytes")
    if num_bytes <= limit:
        return encode_message({"kind": "answer"}, path.read_bytes(), codec=check_codec(_text(header, "codec")))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return encode_message({"kind": "stored", "num_bytes": num_bytes, "sha256": digest})


def _hand_over(node: Node, header: dict[str, Any], body: bytes) -> RecordDict:
    """A piece of an answer that the owner has let go."""
    path = _answer_path(node, _text(header, "answer_key"))
    if not path.is_file() or not _marks(node, path)[0].is_file():
        return encode_message({"kind": "no answer"})
    with path.open("rb") as file:
        file.seek(_count(header, "offset"))
        piece = file.read(_count(header, "num_bytes"))
    return encode_message({"kind": "piece"}, piece, codec=check_codec(_text(header, "codec")))


def _notice(node: Node, header: dict[str, Any], body: bytes) -> RecordDict:
    """What the server has to say: that this client was turned away, or that the federation is over."""
    about, text = _text(header, "about"), _text(header, "text")
    write_atomically(node.home / "notice.json", json.dumps({"about": about, "text": text}).encode())
    node.tell({"event": "notice", "about": about, "text": text})
    return encode_message({"kind": "heard"})


def _kept_reply(node: Node, path: Path, answer_key: str) -> Reply | None:
    """An answer that was given before, if it is there and whole."""
    try:
        data = path.read_bytes()
        reply = open_reply(
            data,
            client_id=node.name,
            answer_key=answer_key,
            public_key=node.key.public_key,
            max_upload_bytes=len(data) + SLACK_BYTES,
        )
    except (OSError, FedfuseError):
        return None
    return reply if reply.upload is not None else None


def _kept_agreement(node: Node, header: Mapping[str, Any]) -> bytes | None:
    """The agreement that the server means, if it is there and whole."""
    digest = _answer_name(_text(header, "agreement"))
    try:
        data = (node.home / "agreements" / digest).read_bytes()
    except OSError:
        return None
    return data if hashlib.sha256(data).hexdigest() == digest else None


def _keep_newest(last: Path, num_files: int) -> None:
    """Remove all but the newest files of a kind, and what belongs to the removed ones.

    The one that was written last is kept whatever the clock says: it may have jumped back.
    """
    files = [p for p in last.parent.iterdir() if p.suffix == last.suffix and p != last and not p.name.startswith(".")]
    num_too_many = max(0, len(files) + 1 - num_files)
    for path in sorted(files, key=lambda path: path.stat().st_mtime_ns)[:num_too_many]:
        path.unlink(missing_ok=True)
        path.with_suffix(".approved").unlink(missing_ok=True)


def _answer_name(answer_key: str) -> str:
    # The key comes from outside and becomes part of a file's name.
    if not re.fullmatch(r"[0-9a-f]{8,128}", answer_key):
        raise MessageError(f"{answer_key!r:.60} is no key of an answer", fix="use the same version on both sides")
    return answer_key


def _answer_path(node: Node, answer_key: str) -> Path:
    return node.home / "answers" / f"{_answer_name(answer_key)}.fed"


def _text(header: Mapping[str, Any], key: str) -> str:
    value = header.get(key)
    if not isinstance(value, str):
        raise MessageError(f'the message has no text "{key}"', fix="use the same version on both sides")
    return value


def _count(header: Mapping[str, Any], key: str) -> int:
    value = header.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise MessageError(f'the message has no number "{key}"', fix="use the same version on both sides")
    return value
