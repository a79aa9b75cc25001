"""What each client has done so far, as a file that ``fedfuse status`` reads while the server works."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedfuse.core.files import write_atomically


@dataclass
class ClientStatus:
    """One client's line.

    Args:
        is_online: whether a node carries this client now.
        enrolled_at: seconds since 1970; 0 before.
        last_seen: when it last answered anything; 0 before.
        exchange: the last one that it was asked in.
        state: ``awaited``, ``enrolled``, ``asked``, ``sending``, ``answered`` or ``missing``.
        reason: why it is missing.
        received_bytes: of an answer that comes in pieces.
        expected_bytes: of that answer.
        upload_wire_bytes: that crossed from the client in all.
        download_wire_bytes: that crossed to the client in all.
        known: what its owner lets the server know.
    """

    is_online: bool = False
    enrolled_at: float = 0.0
    last_seen: float = 0.0
    exchange: str = ""
    state: str = "awaited"
    reason: str = ""
    received_bytes: int = 0
    expected_bytes: int = 0
    upload_wire_bytes: int = 0
    download_wire_bytes: int = 0
    known: dict[str, Any] | None = None


class Board:
    """All lines, written at most once a second.

    Args:
        path: JSON; ``None`` writes nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.exchange = ""
        self.clients: dict[str, ClientStatus] = {}
        self.turned_away: list[dict[str, Any]] = []
        self._written_s = float("-inf")
        self._last = b""

    def line(self, name: str) -> ClientStatus:
        """The line of a client, made when it is first asked for.

        Args:
            name: the client's name.
        """
        return self.clients.setdefault(name, ClientStatus())

    def asked(self, name: str, exchange: str) -> None:
        """Note that a client is asked.

        Args:
            name: the client's name.
            exchange: key of the exchange.
        """
        line = self.line(name)
        line.exchange, line.state, line.reason = exchange, "asked", ""
        self.exchange = exchange

    def turn_away(self, node_id: int, reason: str) -> None:
        """Note a node that may not take part; the last hundred are kept.

        Args:
            node_id: the node.
            reason: why.
        """
        self.turned_away = [*self.turned_away[-99:], {"node": node_id, "reason": reason, "at": time.time()}]

    def write(self, *, now: bool = False) -> None:
        """Write the file if it is time.

        Args:
            now: do not wait for the second to be over.
        """
        if self.path is None or (not now and time.monotonic() - self._written_s < 1.0):
            return
        facts = {
            "exchange": self.exchange,
            "clients": {name: asdict(line) for name, line in sorted(self.clients.items())},
            "turned_away": self.turned_away,
        }
        text = json.dumps(facts, sort_keys=True).encode()
        self._written_s = time.monotonic()
        # Days of waiting should not wear the disk; the file's own time says when something last happened.
        if text != self._last:
            write_atomically(self.path, text, syncs_folder=False)
            self._last = text
