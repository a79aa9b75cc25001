"""What the terminal of a federation's server shows."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from fedfuse.commands.live import Live
from fedfuse.commands.status import read_status, status_table
from fedfuse.core.errors import ConfigError


class ServingLive(Live):
    """What the server's terminal shows: who has sent what, above the bars of a run.

    Args:
        folder: the run's folder.
        console: where; the terminal's error stream if left out.
    """

    def __init__(self, folder: Path, console: Console | None = None) -> None:
        self._folder = folder
        self._read_s = float("-inf")
        self._board: RenderableType = Text("")
        super().__init__(console)

    def picture(self) -> Group:
        """What is on the screen: a line for each client, and the bars."""
        if time.monotonic() - self._read_s > 1:
            self._read_s = time.monotonic()
            with suppress(ConfigError):
                self._board = status_table(read_status(self._folder))
        return Group(self._board, *super().picture().renderables)

    def heard(self, facts: Mapping[str, Any]) -> None:
        """Say what the runtime has noticed, where it matters to the operator.

        Args:
            facts: a line of its log.
        """
        who, event = facts.get("client") or f"node {facts.get('node', '')}", facts.get("event")
        reason = str(facts.get("reason", "")).splitlines()[:1]
        if event == "enrolled":
            self._say(f"{who} is here")
        elif event in ("turned away", "not enrolled", "asked again"):
            self._say(f"{who}: {event}: {' '.join(reason)}")

    def exchange(self, key: str, client_id: str, done: int, total: int, fraction: float) -> None:
        """Move an exchange's bar, and say who has answered where there is no terminal.

        Args:
            key: the exchange.
            client_id: the client; empty at the start.
            done: clients that are done.
            total: clients asked.
            fraction: of this client's work.
        """
        super().exchange(key, client_id, done, total, fraction)
        if client_id and fraction == 1.0 and not self.console.is_terminal:
            self._say(f"{key}: {client_id} is done ({done} of {total})")
