"""Messages of the stages of a secure sum over a grid: one to each client, sent again when its node comes back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from flwr.app import Message, RecordDict

from fedfuse.core.errors import FedfuseError, SealError
from fedfuse.core.sealing import unseal
from fedfuse.runtimes.flower.board import Board
from fedfuse.runtimes.flower.codec import (
    Codec,
    MessageError,
    decode_message,
    encode_message,
    plain_words,
    wire_bytes,
    with_header,
)
from fedfuse.runtimes.flower.enrolment import Enrolment
from fedfuse.runtimes.flower.post import AWAY, BROKEN, Post
from fedfuse.runtimes.flower.secagg import Answer, Parcel
from fedfuse.runtimes.flower.secagg_client import MASK
from fedfuse.runtimes.members import Members

_MAX_TRIES = 3
_PAUSE_S = 1.0


@dataclass
class _Errand:
    """One client's message of a stage, until its answer is there."""

    client_id: str
    parcel: Parcel
    sent_id: str = ""
    node_id: int = 0
    connected_at: str = ""
    not_before_s: float = 0.0
    num_tries: int = 0
    upload_wire_bytes: int = 0
    download_wire_bytes: int = 0

    def answer(self, **found: Any) -> Answer:
        return Answer(
            self.client_id,
            upload_wire_bytes=self.upload_wire_bytes,
            download_wire_bytes=self.download_wire_bytes,
            **found,
        )


@dataclass(frozen=True)
class GridCourier:
    """Carries the messages of a secure sum over a grid.

    Args:
        post: sends and receives.
        enrolment: knows which node carries which client.
        members: their keys and facts.
        board: where each client's line stands.
        agreement: digest of the agreement.
        codec: how messages to clients are compressed; masked numbers cannot be.
        look: takes in what has come, and gives each answer to what its letter is about.
        poll_s: seconds between two looks.
    """

    post: Post
    enrolment: Enrolment
    members: Members
    board: Board
    agreement: str
    codec: Codec
    look: Callable[[], None]
    poll_s: float

    def carry(
        self,
        kind: str,
        parcels: Mapping[str, Parcel],
        deliver: Callable[[Answer], None],
        *,
        timeout_s: float | None,
        max_bytes: int,
    ) -> None:
        """Send one message to each of some clients and wait for one answer from each.

        Args:
            kind: type of the messages.
            parcels: client id to what it gets.
            deliver: called with each answer as soon as it is there, in any order; it is not kept.
            timeout_s: most seconds until the last answer; ``None`` is no limit.
            max_bytes: larger answers are refused.
        """
        waiting = {client_id: _Errand(client_id, parcels[client_id]) for client_id in sorted(parcels)}
        packed: dict[int, RecordDict] = {}

        def settle(answer: Answer) -> None:
            del waiting[answer.client_id]
            self._note(kind, answer)
            deliver(answer)

        def take(errand: _Errand, message_id: str, message: Message) -> None:
            # An old answer may come after the client's node was asked again.
            if message_id != errand.sent_id or waiting.get(errand.client_id) is not errand:
                return
            answer = self._read(errand, message, max_bytes)
            if answer is not None:
                settle(answer)

        start = time.monotonic()
        while waiting:
            nodes = self.post.nodes()
            for errand in list(waiting.values()):
                self._send(kind, errand, nodes, packed, partial(take, errand))
            num_waiting = len(waiting)
            self.look()
            if timeout_s is not None and time.monotonic() - start >= timeout_s:
                break
            if len(waiting) == num_waiting:
                time.sleep(self.poll_s)
        self.post.forget(kind)
        for errand in list(waiting.values()):
            is_there = self.enrolment.carrier(errand.client_id, self.post.nodes()) is not None
            where = "it is at work" if is_there else "it was not connected"
            settle(errand.answer(error=f"no answer within {timeout_s or 0:g} s; {where} at the end"))

    def _send(
        self,
        kind: str,
        errand: _Errand,
        nodes: Mapping[int, str],
        packed: dict[int, RecordDict],
        about: Callable[[str, Message], None],
    ) -> None:
        node_id, now = self.enrolment.carrier(errand.client_id, nodes), time.monotonic()
        if node_id is None or now < errand.not_before_s:
            return
        if errand.sent_id and (errand.node_id, errand.connected_at) == (node_id, nodes[node_id]):
            return
        body = errand.parcel.body
        if id(body) not in packed:
            # Only the last one is kept: in the first stage it is everybody's, in the others nobody else's.
            packed.clear()
            packed[id(body)] = encode_message({}, body, codec=self.codec)
        facts = asdict(self.members.enrolled[errand.client_id].facts)
        content = with_header(packed[id(body)], {**errand.parcel.header, "agreement": self.agreement, "facts": facts})
        errand.sent_id = self.post.send(kind, node_id, content, about)
        errand.node_id, errand.connected_at = node_id, nodes[node_id]
        if errand.sent_id:
            errand.download_wire_bytes += wire_bytes(content)
            self.board.line(errand.client_id).state = "asked"
        else:
            errand.not_before_s = now + _PAUSE_S

    def _read(self, errand: _Errand, message: Message, max_bytes: int) -> Answer | None:
        """The answer that a message holds; nothing if the client must be asked again."""
        if message.has_error():
            reason = plain_words(message.error.reason or "")
            return self._again(errand, reason, is_away=message.error.code in AWAY, stops=message.error.code in BROKEN)
        errand.upload_wire_bytes += wire_bytes(message.content)
        self.board.line(errand.client_id).last_seen = time.time()
        try:
            header, body = decode_message(message.content, max_bytes=max_bytes)
            if header.get("kind") == "enrol me":
                self.enrolment.forget(errand.node_id)
                return self._again(errand, plain_words(str(header.get("reason", ""))))
            if header.get("kind") != "sum":
                reason = plain_words(str(header.get("reason", "")))
                raise MessageError(reason or "the reply says nothing that was asked for")
            sealed = unseal(body, max_bytes=max_bytes)
            if sealed.public_key != self.members.enrolled[errand.client_id].public_key:
                raise SealError("the answer is signed by another key than the client's")
        except FedfuseError as error:
            return errand.answer(error=error.what)
        return errand.answer(sealed=sealed)

    def _again(self, errand: _Errand, reason: str, *, is_away: bool = False, stops: bool = False) -> Answer | None:
        errand.sent_id, errand.not_before_s = "", time.monotonic() + _PAUSE_S
        errand.num_tries += 0 if is_away else 1
        if stops or errand.num_tries >= _MAX_TRIES:
            return errand.answer(error=f"the client's app failed: {reason}")
        return None

    def _note(self, kind: str, answer: Answer) -> None:
        line = self.board.line(answer.client_id)
        line.upload_wire_bytes += answer.upload_wire_bytes
        line.download_wire_bytes += answer.download_wire_bytes
        if answer.sealed is None:
            line.state, line.reason = "missing", answer.error
        elif kind == MASK:
            line.state, line.reason = "answered", ""
