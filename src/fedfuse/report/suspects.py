"""Uploads that look wrong, as a run's folder lists them, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_PRINTED = 10


@dataclass(frozen=True)
class SuspectRow:
    """An upload that looks wrong.

    Args:
        client: client id.
        exchange: key of the exchange.
        reason: a few words.
    """

    client: str
    exchange: str
    reason: str


def read_suspects(result: Mapping[str, Any]) -> list[SuspectRow]:
    """The suspects of a run; what is no table is passed over.

    Args:
        result: as in ``result.json``.
    """
    found = result.get("suspects")
    rows = [item for item in found if isinstance(item, Mapping)] if isinstance(found, list) else []
    return [SuspectRow(*(str(row.get(name) or "") for name in ("client", "exchange", "reason"))) for row in rows]


def suspect_lines(suspects: Sequence[SuspectRow]) -> list[str]:
    """A line for each of the first suspects.

    Args:
        suspects: of a run.
    """
    lines = [
        f"the upload of {suspect.client} in {suspect.exchange} looks wrong: {suspect.reason}"
        for suspect in suspects[:MOST_PRINTED]
    ]
    more = len(suspects) - len(lines)
    return [*lines, *([f"{more} more uploads that look wrong are in the report"] if more else [])]


def suspect_sentences(suspects: Sequence[SuspectRow]) -> list[str]:
    """What the head of a report says of them.

    Args:
        suspects: of a run.
    """
    count = len({suspect.client for suspect in suspects})
    if not count:
        return []
    return [f"What {'one client' if count == 1 else f'{count} clients'} sent looks wrong."]
