"""Questions on their way to their answers, over all the messages that this takes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from flwr.app import Message, RecordDict

from fedfuse.core.client import Reply, Request
from fedfuse.core.cohort import ClientFacts
from fedfuse.core.errors import FedfuseError, SealError
from fedfuse.runtimes.flower.board import Board
from fedfuse.runtimes.flower.codec import (
    SLACK_BYTES,
    Codec,
    MessageError,
    decode_message,
    encode_message,
    open_reply,
    plain_words,
    request_header,
    wire_bytes,
    with_header,
)
from fedfuse.runtimes.flower.enrolment import Enrolment
from fedfuse.runtimes.flower.incoming import Incoming
from fedfuse.runtimes.flower.node import CHUNK, TASK
from fedfuse.runtimes.flower.post import AWAY, BROKEN, Letter, Post
from fedfuse.runtimes.members import Members

_MAX_TRIES = 3
_PAUSE_S = 1.0
_PATIENCE_S = 60.0
"""Before a question that nothing came of is sent once more; doubled each time, up to an hour."""


def _no_progress(client_id: str, done: int, total: int) -> None:
    pass


@dataclass
class _Ask:
    """One question on its way to its answer, over all messages that this takes."""

    request: Request
    facts: ClientFacts
    sent_id: str = ""
    node_id: int = 0
    connected_at: str = ""
    not_before_s: float = 0.0
    sent_at_s: float = 0.0
    patience_s: float = field(default_factory=lambda: _PATIENCE_S)
    num_tries: int = 0
    incoming: Incoming | None = None
    upload_wire_bytes: int = 0
    download_wire_bytes: int = 0

    @property
    def name(self) -> str:
        return self.request.client_id


class Questions:
    """All questions that are open.

    Args:
        post: sends and receives.
        enrolment: knows which node carries which client.
        members: knows the clients' keys and facts.
        board: where each client's line stands.
        agreement: digest of what was agreed on.
        codec: how messages are compressed, both ways.
        chunk_bytes: larger answers are fetched in pieces of this size.
        max_upload_bytes: larger uploads are refused.
        folder: of pieces; ``None`` keeps them in memory.
        log: called with a table for the log.
    """

    def __init__(
        self,
        post: Post,
        enrolment: Enrolment,
        members: Members,
        board: Board,
        *,
        agreement: str,
        codec: Codec,
        chunk_bytes: int,
        max_upload_bytes: int,
        folder: Path | None,
        log: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._post, self._enrolment, self._members, self._board, self._log = post, enrolment, members, board, log
        self._digest, self._codec, self._chunk_bytes = agreement, codec, chunk_bytes
        self._max_upload_bytes, self._folder = max_upload_bytes, folder
        self._asks: dict[str, _Ask] = {}
        self._delivered: list[Incoming] = []
        self._packed: tuple[bytes, RecordDict] | None = None
        self.progress: Callable[[str, int, int], None] = _no_progress

    def clients(self) -> list[str]:
        """Names of the clients that have been asked something and have not answered yet, sorted."""
        return sorted({ask.name for ask in self._asks.values()})

    def add(self, request: Request) -> None:
        """Open a question; one that is open already stays as it is.

        Args:
            request: what is asked, and of whom.
        """
        if request.answer_key not in self._asks:
            # The question was made from these facts; a client that has come with others since must not answer it.
            self._asks[request.answer_key] = _Ask(request, self._members.enrolled[request.client_id].facts)

    def rest(self) -> None:
        """Nobody waits for the moment: nothing is told and nothing large is held."""
        self._packed, self.progress = None, _no_progress

    def clean(self) -> None:
        """Remove the pieces of answers that are written down elsewhere now."""
        for incoming in self._delivered:
            incoming.remove()
        self._delivered.clear()

    def dispatch(self, nodes: Mapping[int, str]) -> None:
        """Send what each question needs next.

        Args:
            nodes: those that are connected, and since when.
        """
        for ask in list(self._asks.values()):
            self._dispatch(ask, nodes)

    def _dispatch(self, ask: _Ask, nodes: Mapping[int, str]) -> None:
        """Send what the question needs next, if its client is there and nothing is on its way to it."""
        node_id, now = self._enrolment.carrier(ask.name, nodes), time.monotonic()
        if node_id is None or now < ask.not_before_s:
            return
        if ask.sent_id and (ask.node_id, ask.connected_at) == (node_id, nodes[node_id]):
            if now - ask.sent_at_s < ask.patience_s:
                return
            # A connection that breaks at a bad moment costs Flower a message, and nobody is told. A client that is
            # still at work answers twice, the second time without computing.
            ask.patience_s = min(2 * ask.patience_s, 3600.0)
        terms = {"codec": self._codec, "chunk_bytes": self._chunk_bytes}
        about: tuple[_Ask, int] = (ask, 0)
        if ask.incoming is not None and (piece := ask.incoming.missing()):
            about, kind = (ask, piece[0]), CHUNK
            facts = {"answer_key": ask.request.answer_key, "offset": piece[0], "num_bytes": piece[1]}
            content = encode_message({**terms, **facts})
        else:
            kind = TASK
            header = {"request": request_header(ask.request), "agreement": self._digest}
            content = with_header(self._pack(ask.request.payload), {**terms, **header, "facts": asdict(ask.facts)})
        ask.sent_id = self._post.send(kind, node_id, content, about)
        ask.node_id, ask.connected_at, ask.sent_at_s = node_id, nodes[node_id], now
        if ask.sent_id:
            ask.download_wire_bytes += wire_bytes(content)
        else:
            ask.not_before_s = now + _PAUSE_S

    def _pack(self, payload: bytes) -> RecordDict:
        """The packed payload; many clients are sent the same one."""
        if self._packed is None or self._packed[0] is not payload:
            self._packed = (payload, encode_message({}, payload, codec=self._codec))
        return self._packed[1]

    def read(self, message_id: str, letter: Letter, message: Message) -> Reply | None:
        """What a message says about its question.

        Args:
            message_id: of the letter.
            letter: what was sent.
            message: what came back.

        Returns:
            The reply once there is one, or nothing yet.
        """
        ask, offset = letter.about
        is_old = ask.sent_id != message_id
        if ask.request.answer_key not in self._asks:
            self._ignore(ask, "answered")
            return None
        if message.has_error():
            return None if is_old else self._again(ask, message.error.code, plain_words(message.error.reason or ""))
        self._board.line(ask.name).last_seen = time.time()
        ask.upload_wire_bytes += wire_bytes(message.content)
        try:
            header, body = decode_message(message.content, max_bytes=self._max_upload_bytes + SLACK_BYTES)
            if is_old and header.get("kind") != "answer":
                raise MessageError("another message has taken its place")
            return self._step(ask, header, body, offset if letter.kind == CHUNK else None)
        except (MessageError, SealError) as error:
            if not is_old:
                return self._settle(ask, Reply(ask.name, error=str(error)))
            # It was asked again meanwhile: what comes of that counts.
            self._ignore(ask, error.what)
            return None

    def _ignore(self, ask: _Ask, reason: str) -> None:
        self._log({"event": "ignored reply", "client": ask.name, "exchange": ask.request.exchange, "reason": reason})

    def _step(self, ask: _Ask, header: Mapping[str, Any], body: bytes, offset: int | None) -> Reply | None:
        kind, line = header.get("kind"), self._board.line(ask.name)
        if kind == "answer" and offset is None:
            return self._settle(ask, self._open(ask, body))
        if kind == "stored" and offset is None:
            ask.incoming = self._announced(ask, header)
        elif kind == "piece" and offset is not None and ask.incoming is not None:
            ask.incoming.add(offset, body)
        elif kind == "enrol me":
            self._enrolment.forget(ask.node_id)
            return self._again(ask, None, plain_words(str(header.get("reason", ""))))
        elif kind == "no answer" and offset is not None:
            ask.incoming = None
            return self._again(ask, None, "the client no longer has the answer that it announced")
        else:
            raise MessageError(
                plain_words(str(header.get("reason", ""))) or "the reply says nothing that was asked for"
            )
        ask.sent_id = ""
        done, total = ask.incoming.received_bytes, ask.incoming.num_bytes
        line.state, line.received_bytes, line.expected_bytes = "sending", done, total
        self.progress(ask.name, done, total)
        return None if ask.incoming.missing() else self._settle(ask, self._open(ask, ask.incoming.whole()))

    def _open(self, ask: _Ask, data: bytes) -> Reply:
        return open_reply(
            data,
            client_id=ask.name,
            answer_key=ask.request.answer_key,
            public_key=self._members.enrolled[ask.name].public_key,
            max_upload_bytes=self._max_upload_bytes,
        )

    def _announced(self, ask: _Ask, header: Mapping[str, Any]) -> Incoming:
        num_bytes, sha256 = header.get("num_bytes"), header.get("sha256")
        # The digest becomes part of files' names.
        if not isinstance(num_bytes, int) or not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise MessageError("the reply announces an answer without saying which")
        if not 0 < num_bytes <= self._max_upload_bytes + SLACK_BYTES:
            raise MessageError(
                f"the answer has {num_bytes:,} bytes, more than the limit of {self._max_upload_bytes:,}",
                fix="raise federation.max_upload_bytes",
            )
        folder = None if self._folder is None else self._folder / ask.request.answer_key
        return Incoming(folder, num_bytes, sha256, self._chunk_bytes)

    def _again(self, ask: _Ask, code: int | None, reason: str) -> Reply | None:
        """Ask once more after a failure of the way; give up when the fault is not the way's."""
        is_away = code in AWAY
        ask.sent_id, ask.not_before_s = "", time.monotonic() + _PAUSE_S
        ask.num_tries += 0 if is_away else 1
        self._log({"event": "asked again", "client": ask.name, "exchange": ask.request.exchange, "reason": reason})
        if code in BROKEN or ask.num_tries >= _MAX_TRIES:
            fix = "look at the client's log, mend it, and run the same command again"
            return self._settle(
                ask, Reply(ask.name, error=str(FedfuseError(f"the client's app failed: {reason}", fix=fix)))
            )
        return None

    def _settle(self, ask: _Ask, reply: Reply) -> Reply:
        """The end of a question."""
        del self._asks[ask.request.answer_key]
        if ask.incoming is not None:
            self._delivered.append(ask.incoming)
        line = self._board.line(ask.name)
        line.state, line.reason = ("missing", reply.error) if reply.upload is None else ("answered", "")
        line.received_bytes = line.expected_bytes = 0
        line.upload_wire_bytes += ask.upload_wire_bytes
        line.download_wire_bytes += ask.download_wire_bytes
        return replace(
            reply,
            answer_key=ask.request.answer_key,
            upload_wire_bytes=ask.upload_wire_bytes,
            download_wire_bytes=ask.download_wire_bytes,
        )

    def overdue(self, answer_key: str, limit_s: float) -> None:
        """Note a client that has not answered in time; its question stays open, so no reply is made up for it.

        Args:
            answer_key: the question.
            limit_s: how long was waited.
        """
        ask = self._asks[answer_key]
        where = (
            "it was not connected" if self._enrolment.carrier(ask.name, self._post.nodes()) is None else "it is at work"
        )
        line = self._board.line(ask.name)
        line.state, line.reason = "missing", f"no answer within {limit_s:g} s; {where} at the end"
        self._log({"event": "overdue", "client": ask.name, "exchange": ask.request.exchange, "reason": line.reason})
