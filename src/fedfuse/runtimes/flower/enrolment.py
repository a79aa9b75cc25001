"""Nodes come, show their cards, and carry a client; or they are turned away."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from flwr.app import Message, RecordDict

from fedfuse.core.cohort import ClientFacts, check_client_id
from fedfuse.core.errors import FedfuseError, SealError
from fedfuse.core.sealing import Sealed, unseal
from fedfuse.runtimes.flower.board import Board
from fedfuse.runtimes.flower.codec import (
    MessageError,
    decode_message,
    encode_message,
    plain_words,
    wire_bytes,
    with_header,
)
from fedfuse.runtimes.flower.node import ENROL, NOTICE
from fedfuse.runtimes.flower.post import Letter, Post
from fedfuse.runtimes.members import Member, Members, TurnedAway

_MAX_CARD_BYTES = 1 << 20
_PAUSE_S = 1.0
_PATIENCE_S = 60.0


class Enrolment:
    """Which node carries which client.

    Args:
        post: sends and receives.
        members: who takes part.
        agreement: what every node is told, packed.
        board: where each client's line stands.
        log: called with a table for the log.
    """

    def __init__(
        self,
        post: Post,
        members: Members,
        agreement: RecordDict,
        board: Board,
        log: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._post, self._members, self._agreement, self._board, self._log = post, members, agreement, board, log
        self._names: dict[int, str] = {}
        self._current: dict[str, int] = {}
        self._greet_at_s: dict[int, float] = {}
        self._turned_away: dict[int, str] = {}
        self.is_open = True
        for name in members.expected or members.enrolled:
            board.line(name)
        for name, member in members.enrolled.items():
            line = board.line(name)
            line.state, line.enrolled_at, line.known = "enrolled", member.enrolled_at, dict(member.known)

    def reopen(self) -> None:
        """Let clients come with other data than before, and those that were turned away try again."""
        self.is_open = True
        self._turned_away.clear()

    def close(self) -> None:
        """From now on questions are made: clients may come back, with the same data only."""
        self.is_open = False

    def carrier(self, name: str, nodes: Collection[int]) -> int | None:
        """The node that carries a client: the one that did while it is connected, else the first that proved its key.

        Args:
            name: the client.
            nodes: those that are connected.
        """
        if self._current.get(name) not in nodes:
            others = [node_id for node_id, owner in self._names.items() if owner == name and node_id in nodes]
            if not others:
                return None
            self._current[name] = others[0]
        return self._current[name]

    def greet(self, nodes: Mapping[int, str]) -> None:
        """Ask the nodes that are new who they are.

        Args:
            nodes: those that are connected.
        """
        new = self._new(nodes)
        if not new:
            return
        asked, now = self._post.waits_for(ENROL), time.monotonic()
        for node_id in new:
            next_at_s = self._greet_at_s.get(node_id, 0.0)
            # A greeting that a cut network has swallowed is sent again; whichever card comes first counts.
            if now >= (next_at_s if node_id not in asked else next_at_s + _PATIENCE_S):
                nonce = secrets.token_hex(16)
                about = (nonce, nodes[node_id])
                self._post.send(ENROL, node_id, with_header(self._agreement, {"nonce": nonce}), about)
                self._greet_at_s[node_id] = now + _PAUSE_S

    def is_greeting(self, nodes: Mapping[int, str]) -> bool:
        """Whether one of the nodes has yet to show its card.

        Args:
            nodes: those that are connected.
        """
        return bool(self._new(nodes))

    def _new(self, nodes: Mapping[int, str]) -> list[int]:
        """Nodes that are nobody's; one that was turned away is heard again once it has come anew."""
        return [
            node_id
            for node_id, connected_at in nodes.items()
            if node_id not in self._names and self._turned_away.get(node_id) != connected_at
        ]

    def forget(self, node_id: int) -> None:
        """Greet a node anew: it no longer knows what was agreed.

        Args:
            node_id: the node.
        """
        self._names.pop(node_id, None)

    def say(self, node_id: int, about: str, text: str) -> None:
        """Send words for a node's owner.

        Args:
            node_id: the node.
            about: ``turned away`` or ``over``.
            text: what is to be read.
        """
        self._post.send(NOTICE, node_id, encode_message({"about": about, "text": text}))

    def admit(self, letter: Letter, message: Message) -> None:
        """Take in a node that answered a greeting, or turn it away.

        Args:
            letter: the greeting.
            message: its answer.
        """
        node_id, (nonce, connected_at) = letter.node_id, letter.about
        if message.has_error():
            self._log({"event": "not enrolled", "node": node_id, "reason": plain_words(message.error.reason or "")})
            return
        try:
            header, body = decode_message(message.content, max_bytes=_MAX_CARD_BYTES)
            if header.get("kind") != "card":
                raise TurnedAway("it cannot take part", where=plain_words(str(header.get("reason", ""))))
            card = unseal(body, max_bytes=_MAX_CARD_BYTES)
            member = self._members.admit(_member(card, nonce, self._members.agreement), may_change=self.is_open)
        except (TurnedAway, SealError, MessageError) as error:
            self._turned_away[node_id] = connected_at
            self._log({"event": "turned away", "node": node_id, "reason": str(error)})
            self._board.turn_away(node_id, str(error))
            self.say(node_id, "turned away", str(error))
            return
        self._names[node_id] = member.name
        line = self._board.line(member.name)
        line.enrolled_at, line.known, line.last_seen = member.enrolled_at, dict(member.known), time.time()
        line.state = "enrolled" if line.state == "awaited" else line.state
        line.download_wire_bytes += wire_bytes(self._agreement)
        line.upload_wire_bytes += wire_bytes(message.content)
        self._log({"event": "enrolled", "client": member.name, "node": node_id})


def _member(card: Sealed, nonce: str, agreement: str) -> Member:
    """Whose card this is; the nonce shows that it is no old one."""
    try:
        return _checked(card, nonce, agreement)
    except FedfuseError as error:
        raise TurnedAway(f"its card is not valid: {error.what}", fix="join with the same version") from None


def _checked(card: Sealed, nonce: str, agreement: str) -> Member:
    facts = card.manifest
    if card.text("kind") != "card" or card.text("nonce") != nonce or card.text("agreement") != agreement:
        raise SealError("it answers another server")
    num_threads, known, count = facts.get("num_threads"), facts.get("known"), facts.get("num_examples")
    is_count = count is None or (isinstance(count, int) and count >= 0)
    is_known = isinstance(known, dict) and len(json.dumps(known)) <= 1 << 16
    if not isinstance(num_threads, int) or not is_count or not is_known:
        raise SealError("its facts are not complete")
    return Member(
        check_client_id(card.text("name")),
        card.public_key,
        ClientFacts(card.text("fingerprint"), num_threads, card.text("device"), count),
        dict(known or {}),
        time.time(),
    )
