"""Letters to nodes and back: Flower's push and pull, with a note of what each message was about."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

_TTL_S = 30 * 24 * 3600.0
"""An exchange may last days; a message that expires is sent again."""

_PULLED_AT_ONCE = 16
"""Replies that are in memory together; with hundreds of clients all of them would not fit."""

AWAY = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)
"""Errors that say that a node has gone, not that anything is wrong with it."""

BROKEN = (ErrorCode.LOAD_CLIENT_APP_EXCEPTION, ErrorCode.INVALID_FAB)
"""Errors that come again every time."""


@dataclass(frozen=True)
class Letter:
    """A message that is on its way.

    Args:
        kind: its type.
        node_id: to whom.
        about: what its reply belongs to.
    """

    kind: str
    node_id: int
    about: Any = None


class Post:
    """All messages of one server.

    Args:
        grid: Flower's.
        log: called with a table for the log.
    """

    def __init__(self, grid: Grid, log: Callable[[Mapping[str, Any]], None]) -> None:
        self._grid, self._log = grid, log
        self._letters: dict[str, Letter] = {}
        self._pulled: deque[Message] = deque()

    def nodes(self) -> dict[int, str]:
        """Nodes that are connected now, in the order of their ids, each with when it last connected.

        A node that was killed may come back under its old id so soon that Flower never missed it; what it had been
        sent is lost then, and only this stamp shows it.
        """
        found = {int(node.node_id): str(node.last_activated_at) for node in self._grid.get_nodes()}
        return dict(sorted(found.items()))

    def send(self, kind: str, node_id: int, content: RecordDict, about: Any = None) -> str:
        """Send a message.

        Args:
            kind: its type.
            node_id: to whom.
            content: from the codec.
            about: what its reply belongs to.

        Returns:
            Its id; empty if it could not be sent, for instance because the node has just gone.
        """
        message = Message(content, dst_node_id=node_id, message_type=kind, ttl=_TTL_S)
        ids = [message_id for message_id in self._grid.push_messages([message]) if message_id]
        if not ids:
            return ""
        self._letters[ids[0]] = Letter(kind, node_id, about)
        return ids[0]

    def received(self) -> Iterator[tuple[str, Letter, Message]]:
        """What has come back since the last look, few at a time.

        Yields:
            Id of the message that was sent, what it was, and its reply.
        """
        waiting = list(self._letters)
        for start in range(0, max(len(waiting), len(self._pulled)), _PULLED_AT_ONCE):
            # What was pulled is gone from Flower: it waits here if the reader stops in the middle.
            self._pulled.extend(self._grid.pull_messages(waiting[start : start + _PULLED_AT_ONCE]))
            while self._pulled:
                message = self._pulled.popleft()
                message_id = message.metadata.reply_to_message_id
                letter = self._letters.pop(message_id, None)
                if letter is None:
                    self._log({"event": "ignored reply", "node": message.metadata.src_node_id, "reason": "unasked"})
                else:
                    yield message_id, letter, message

    def waits_for(self, kind: str) -> set[int]:
        """Nodes that have not yet answered a message of that type.

        Args:
            kind: the type.
        """
        return {letter.node_id for letter in self._letters.values() if letter.kind == kind}

    def forget(self, kind: str) -> None:
        """Wait no longer for replies of that type.

        Args:
            kind: the type.
        """
        self._letters = {key: letter for key, letter in self._letters.items() if letter.kind != kind}
