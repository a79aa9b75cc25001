"""The server's side on Flower: the runtime that carries requests to nodes and brings sealed answers back."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedfuse.core.client import Reply, Request
from fedfuse.core.cohort import ClientFacts
from fedfuse.core.errors import ConfigError, QuorumError
from fedfuse.core.fixed_point import SumSettings
from fedfuse.core.sums import SumLayout, SumReply
from fedfuse.runtimes.flower.board import Board
from fedfuse.runtimes.flower.codec import (
    check_codec,
    encode_message,
)
from fedfuse.runtimes.flower.enrolment import Enrolment
from fedfuse.runtimes.flower.node import CHUNK, ENROL, NOTICE, TASK
from fedfuse.runtimes.flower.post import Post
from fedfuse.runtimes.flower.questions import Questions
from fedfuse.runtimes.flower.secagg import SecureSum
from fedfuse.runtimes.flower.stages import GridCourier
from fedfuse.runtimes.members import Members

_MAX_TRIES = 3
_PAUSE_S = 1.0
_PATIENCE_S = 30.0
"""For nodes that nothing depends on any more."""


def _silent(facts: Mapping[str, Any]) -> None:
    pass


def _no_progress(client_id: str, done: int, total: int) -> None:
    pass


class GridRuntime:
    """Requests over a Flower grid.

    A reply is yielded the moment it is there. A node that goes away is asked again when it, or another node of the same
    client, is back; an answer that comes after its exchange is over is yielded by a later one, with its own answer key.

    Args:
        grid: Flower's.
        agreement: what every client is told, encoded.
        expected: names of the clients that may take part; empty for the first ``num_clients`` that come.
        num_clients: how many to wait for where no names are expected.
        trusted: name to its public key; a name without one belongs to the key that comes first.
        quorum: fraction of the clients that must have enrolled once the deadline is over.
        deadline_s: most seconds to wait for enrolment, and for an exchange without a time limit of its own; ``None``
            waits for ever.
        members: file that remembers who has enrolled; beside it stand ``status.json`` and ``incoming``. ``None`` keeps
            nothing over a restart.
        codec: how messages are compressed, both ways.
        chunk_bytes: larger answers are fetched in pieces of this size, so that a cut costs one piece.
        max_upload_bytes: larger uploads are refused.
        poll_s: seconds between two looks for replies.
        log: called with a table for the log.

    Raises:
        ConfigError: a setting cannot be used.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        agreement: bytes,
        expected: Sequence[str] = (),
        num_clients: int | None = None,
        trusted: Mapping[str, str] | None = None,
        quorum: float = 1.0,
        deadline_s: float | None = None,
        members: Path | None = None,
        codec: str = "none",
        chunk_bytes: int = 64 << 20,
        max_upload_bytes: int = 4 << 30,
        poll_s: float = 0.5,
        log: Callable[[Mapping[str, Any]], None] = _silent,
    ) -> None:
        if not expected and not num_clients:
            raise ConfigError(
                "nobody is expected", where="federation.clients", fix="name the clients, or say how many there are"
            )
        if chunk_bytes < 1:
            raise ConfigError(f"chunk_bytes is {chunk_bytes}", where="federation.chunk_bytes", fix="give at least 1")
        self._post, self._log = Post(grid, log), log
        self._codec = check_codec(codec)
        self._digest = hashlib.sha256(agreement).hexdigest()
        self._members = Members(members, self._digest, expected, trusted or {}, num_clients)
        self._board = Board(None if members is None else members.with_name("status.json"))
        packed = encode_message({}, agreement, codec=self._codec)
        self._enrolment = Enrolment(self._post, self._members, packed, self._board, log)
        self._quorum, self._deadline_s, self._poll_s = quorum, deadline_s, poll_s
        self._questions = Questions(
            self._post,
            self._enrolment,
            self._members,
            self._board,
            agreement=self._digest,
            codec=self._codec,
            chunk_bytes=chunk_bytes,
            max_upload_bytes=max_upload_bytes,
            folder=None if members is None else members.with_name("incoming"),
            log=log,
        )
        self._arrived: list[Reply] = []
        self._is_quiet = True

    @property
    def outstanding(self) -> list[str]:
        """Names of the clients that have been asked something and have not answered yet, sorted."""
        return self._questions.clients()

    def clients(self) -> Mapping[str, ClientFacts]:
        """Wait until the expected clients have enrolled.

        Those that enrolled with an earlier process of the same run count, so that it goes on while they are away.

        Returns:
            All that take part, by id.

        Raises:
            QuorumError: too few came before the deadline.
        """
        self._enrolment.reopen()
        start, complete_since = time.monotonic(), None
        while True:
            self._arrived += self._collect()
            now = time.monotonic()
            if not self._members.awaited():
                complete_since = now if complete_since is None else complete_since
                # Who is connected shows its card before the start: its data may have changed since the last time.
                if not self._enrolment.is_greeting(self._post.nodes()) or now - complete_since > _PATIENCE_S:
                    break
            if self._deadline_s is not None and now - start >= self._deadline_s:
                self._judge(self._deadline_s)
                break
            time.sleep(self._poll_s)
        self._enrolment.close()
        self._board.write(now=True)
        return {name: member.facts for name, member in sorted(self._members.enrolled.items())}

    def exchange(
        self, requests: Sequence[Request], *, timeout_s: float | None, progress: Callable[[str, int, int], None]
    ) -> Iterator[Reply]:
        """Carry out requests and yield each reply when it is there, late ones of earlier exchanges too.

        Args:
            requests: at most one per client.
            timeout_s: most seconds that the exchange may take; ``None`` is the deadline of the federation.
            progress: called with (client id, bytes received, bytes in all) while a large answer comes in.

        Yields:
            A reply per request that was answered in time, and replies that are late.
        """
        self._questions.progress = progress
        wanted = {request.answer_key: request for request in requests}
        arrived = {reply.answer_key for reply in self._arrived}
        for key, request in wanted.items():
            # What is on its way still, or came between two exchanges, is not asked anew.
            if key not in arrived:
                self._questions.add(request)
            self._board.asked(request.client_id, request.exchange)
        limit_s, start = timeout_s if timeout_s is not None else self._deadline_s, time.monotonic()
        while wanted:
            for reply in self._hand_out():
                wanted.pop(reply.answer_key, None)
                yield reply
            if limit_s is not None and time.monotonic() - start >= limit_s:
                break
            if wanted and self._is_quiet:
                time.sleep(self._poll_s)
        for key in wanted:
            self._questions.overdue(key, limit_s or 0.0)
        self._questions.rest()
        self._board.write(now=True)

    def exchange_sum(
        self,
        requests: Sequence[Request],
        layout: SumLayout,
        settings: SumSettings,
        *,
        num_needed: int,
        timeout_s: float | None,
        progress: Callable[[str, int, int], None],
    ) -> SumReply:
        """Carry out requests so that only the total of the uploads is ever seen here.

        Args:
            requests: at most one per client.
            layout: what is added up.
            settings: the operator's decisions.
            num_needed: with fewer clients there is no total.
            timeout_s: most seconds for the task; ``None`` is the deadline of the federation.
            progress: called with (client id, stages done, stages in all).

        Returns:
            The total, and who is in it.
        """
        for request in requests:
            self._board.asked(request.client_id, request.exchange)

        def look() -> None:
            self._arrived += self._collect()

        courier = GridCourier(
            self._post,
            self._enrolment,
            self._members,
            self._board,
            self._digest,
            self._codec,
            look,
            self._poll_s,
        )
        limit_s = timeout_s if timeout_s is not None else self._deadline_s
        found = SecureSum(courier, layout, settings, progress).run(requests, num_needed=num_needed, timeout_s=limit_s)
        self._board.write(now=True)
        return found

    def late_replies(self) -> list[Reply]:
        """Look once for answers whose exchange is over.

        Returns:
            Those that have come, each with the key of its question.
        """
        return list(self._hand_out())

    def dismiss(self, text: str, *, patience_s: float = _PATIENCE_S) -> None:
        """Tell all nodes that the federation is over.

        Args:
            text: what their owners read.
            patience_s: most seconds to wait until they have heard it.
        """
        for node_id in self._post.nodes():
            self._enrolment.say(node_id, "over", text)
        start = time.monotonic()
        while self._post.waits_for(NOTICE) & set(self._post.nodes()) and time.monotonic() - start < patience_s:
            self._arrived += self._collect()
            time.sleep(self._poll_s)

    def close(self) -> None:
        """Write how things stand; Flower's own processes are not this runtime's."""
        self._questions.clean()
        self._board.write(now=True)

    def _hand_out(self) -> Iterator[Reply]:
        while self._arrived:
            yield self._arrived.pop(0)
        for reply in self._collect():
            yield reply
            # Whoever asks for more has written down what was given.
            self._questions.clean()

    def _collect(self) -> Iterator[Reply]:
        """One look: greet who is new, send what must be sent, read what has come."""
        nodes = self._post.nodes()
        self._enrolment.greet(nodes)
        self._questions.dispatch(nodes)
        self._is_quiet = True
        for message_id, letter, message in self._post.received():
            self._is_quiet = False
            if letter.kind == ENROL:
                self._enrolment.admit(letter, message)
            elif callable(letter.about):
                letter.about(message_id, message)
            elif letter.kind in (TASK, CHUNK):
                reply = self._questions.read(message_id, letter, message)
                if reply is not None:
                    yield reply
            self._board.write()
        self._members.save()
        for name, line in self._board.clients.items():
            line.is_online = self._enrolment.carrier(name, nodes) is not None
        self._board.write()

    def _judge(self, limit_s: float) -> None:
        """Too few clients at the deadline stop the run; it can be continued."""
        needed = max(1, math.ceil(self._quorum * self._members.num_expected - 1e-9))
        if len(self._members.enrolled) >= needed:
            return
        self._board.write(now=True)
        raise QuorumError(
            f"{len(self._members.enrolled)} of {self._members.num_expected} clients enrolled within {limit_s:g} s, "
            f"{needed} are needed (missing: {', '.join(self._members.awaited())})",
            where=str(self._members.path or "memory"),
            fix="start the missing clients and run the same command again, or lower federation.quorum",
        )
