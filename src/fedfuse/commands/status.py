"""``fedfuse status``: who takes part in a federation, what each has sent, and who is awaited."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from fedfuse.core.errors import ConfigError
from fedfuse.report.units import format_bytes, natural_key, shorten

STATUS_FILE = "flower/status.json"
"""Where the server's runtime writes how things stand, in the run's folder."""

MEMBERS_FILE = "flower/members.json"
"""Where it remembers who has enrolled."""

_WATCH_S = 2.0


@dataclass(frozen=True)
class ClientLine:
    """One client.

    Args:
        name: its name.
        connection: ``connected``, ``away`` or ``never seen``.
        state: where it stands in the exchange at hand.
        sent: exchange to when it came and its bytes, in the order in which they came.
        wire_bytes: that really crossed, both ways.
    """

    name: str
    connection: str
    state: str
    sent: Mapping[str, tuple[float, int]]
    wire_bytes: int = 0


@dataclass(frozen=True)
class Status:
    """How a federation stands.

    Args:
        headline: one sentence.
        clients: sorted by name.
        turned_away: why, for nodes that may not take part.
        is_over: whether the artifact is there.
    """

    headline: str
    clients: list[ClientLine]
    turned_away: list[str] = field(default_factory=list)
    is_over: bool = False


def read_status(run: Path) -> Status:
    """How a run stands, from what its folder holds; the server need not be running.

    Args:
        run: the folder.

    Raises:
        ConfigError: it is no run of a federation.
    """
    board = _read(run / STATUS_FILE)
    result = _read(run / "result.json")
    sent = _journal(run / "journal")
    if board is None and result is None and not sent:
        raise ConfigError(
            "nothing has happened in this folder yet", where=str(run), fix="name the --out folder of fedfuse serve"
        )
    rows: Mapping[str, Any] = (board or {}).get("clients", {})
    names = sorted({*rows, *sent, *(result or {}).get("missing", {})}, key=natural_key)
    # Who is connected is news only while something is asked.
    lines = [_line(name, rows.get(name), sent.get(name, {})) for name in names]
    clients = [replace(line, connection="") for line in lines] if result is not None else lines
    exchange = str((board or {}).get("exchange", ""))
    turned_away = list(
        dict.fromkeys(str(entry["reason"]).splitlines()[0] for entry in (board or {}).get("turned_away", []))
    )
    return Status(_headline(run, result, exchange, clients), clients, turned_away, result is not None)


def status_table(status: Status) -> Table:
    """A status as a table for a terminal.

    Args:
        status: what was read.
    """
    table = Table(box=None, pad_edge=False, header_style="dim", title=escape(status.headline))
    table.title_justify = "left"
    for name in ("client", "connection", "now", "has sent", "last at"):
        table.add_column(name)
    for name in ("payload", "on the wire"):
        table.add_column(name, justify="right")
    for line in status.clients:
        last = max((at for at, _ in line.sent.values()), default=0.0)
        payload = sum(num_bytes for _, num_bytes in line.sent.values())
        table.add_row(
            escape(line.name),
            line.connection,
            escape(shorten(line.state, 44)),
            escape(shorten(", ".join(line.sent) or "nothing yet", 40)),
            time.strftime("%d %b %H:%M:%S", time.localtime(last)) if last else "",
            format_bytes(payload),
            format_bytes(line.wire_bytes) if line.wire_bytes else "",
        )
    if status.turned_away:
        table.caption = escape("turned away: " + "; ".join(status.turned_away[-3:]))
        table.caption_justify = "left"
    return table


def show(run: Path, *, watches: bool = False, console: Console | None = None) -> None:
    """Print how a run stands.

    Args:
        run: the folder.
        watches: draw it again until the run is done.
        console: where; the terminal if left out.
    """
    console = console or Console()
    status = read_status(run)
    if not watches:
        console.print(status_table(status))
        return
    with Live(status_table(status), console=console, auto_refresh=False) as screen:
        while not status.is_over:
            time.sleep(_WATCH_S)
            status = read_status(run)
            screen.update(status_table(status), refresh=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return table if isinstance(table, dict) else None


def _journal(folder: Path) -> dict[str, dict[str, tuple[float, int]]]:
    """Client to exchange to when its upload came and its bytes."""
    found: list[tuple[float, str, str, int]] = []
    for path in folder.glob("*.json"):
        facts = _read(path)
        if facts is not None and {"client", "exchange", "upload_bytes"} <= facts.keys():
            found.append(
                (path.stat().st_mtime, str(facts["client"]), str(facts["exchange"]), int(facts["upload_bytes"]))
            )
    sent: dict[str, dict[str, tuple[float, int]]] = {}
    for at, client, exchange, num_bytes in sorted(found):
        sent.setdefault(client, {})[exchange] = (at, num_bytes)
    return sent


def _line(name: str, row: Mapping[str, Any] | None, sent: Mapping[str, tuple[float, int]]) -> ClientLine:
    if row is None:
        return ClientLine(name, "", "", sent)
    connection = "connected" if row["is_online"] else "away" if row["last_seen"] else "never seen"
    exchange, state = row["exchange"], row["state"]
    words = {
        "awaited": "awaited",
        "enrolled": "enrolled",
        "asked": f"{exchange}: asked, awaited",
        "answered": f"{exchange}: answered",
        "missing": f"{exchange}: missing: {str(row['reason']).splitlines()[0] if row['reason'] else ''}",
    }
    if state == "sending":
        words[state] = f"{exchange}: {format_bytes(row['received_bytes'])} of {format_bytes(row['expected_bytes'])}"
    wire_bytes = int(row["upload_wire_bytes"]) + int(row["download_wire_bytes"])
    return ClientLine(name, connection, words.get(state, state), sent, wire_bytes)


def _headline(run: Path, result: Mapping[str, Any] | None, exchange: str, clients: list[ClientLine]) -> str:
    if result is not None:
        missing = result.get("missing", {})
        lacking = f", without {', '.join(sorted(missing))}" if missing else ""
        return f"{run}: done{lacking}"
    if exchange:
        awaited = [line.name for line in clients if exchange not in line.sent]
        return f"{run}: exchange {exchange}, awaited: {', '.join(awaited) or 'nobody'}"
    awaited = [line.name for line in clients if line.state == "awaited"]
    return f"{run}: enrolment, awaited: {', '.join(awaited) or 'nobody'}"
