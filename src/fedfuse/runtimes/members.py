"""Who takes part: names, keys and what the server knows of each, remembered over restarts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedfuse.core.cohort import ClientFacts
from fedfuse.core.errors import FedfuseError, JournalError
from fedfuse.core.files import write_atomically


class TurnedAway(FedfuseError):
    """Somebody asked to take part and may not."""


@dataclass(frozen=True)
class Member:
    """A client that takes part in a real federation.

    Args:
        name: the client's name.
        public_key: its signing key, 64 hexadecimal digits.
        facts: what questions to it are made from.
        known: what its owner lets the server know.
        enrolled_at: when, in seconds since 1970.
    """

    name: str
    public_key: str
    facts: ClientFacts
    known: Mapping[str, Any] = field(default_factory=dict)
    enrolled_at: float = 0.0


class Members:
    """All that have enrolled, in a file where one is named.

    Args:
        path: JSON; ``None`` remembers nothing.
        agreement: digest of the agreement; facts that were made under another one are forgotten, keys are not.
        expected: names that may take part; empty for whoever comes first.
        trusted: name to its public key; a name without one belongs to the key that first came with it.
        num_clients: how many may take part where no names are expected.

    Raises:
        JournalError: the file is damaged.
    """

    def __init__(
        self,
        path: Path | None,
        agreement: str,
        expected: Sequence[str],
        trusted: Mapping[str, str],
        num_clients: int | None = None,
    ) -> None:
        self.path, self.agreement, self._num_clients = path, agreement, num_clients
        self._expected = sorted(expected)
        self._trusted = {name: key.lower() for name, key in trusted.items() if key}
        self._first_keys: dict[str, str] = {}
        self._is_written = True
        self.enrolled: dict[str, Member] = {}
        self.removed: set[str] = set()
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            self._first_keys = {str(name): str(key) for name, key in table["keys"].items()}
            self.removed = set(table.get("removed", []))
            for name, row in sorted(table["clients"].items()):
                member = Member(name, row["public_key"], ClientFacts(**row["facts"]), row["known"], row["enrolled_at"])
                is_welcome = not self.expected or name in self.expected
                if table["agreement"] == self.agreement and is_welcome and member.public_key == self._key_of(name):
                    self.enrolled[name] = member
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise _unreadable(path) from None

    @property
    def expected(self) -> list[str]:
        """Names that may take part, sorted; empty for whoever comes first."""
        return [name for name in self._expected if name not in self.removed]

    def _key_of(self, name: str) -> str | None:
        return self._trusted.get(name, self._first_keys.get(name))

    def awaited(self) -> list[str]:
        """Names that are expected and have not enrolled; in their place a count where no names are expected."""
        if self.expected:
            return [name for name in self.expected if name not in self.enrolled]
        lacking = (self._num_clients or 0) - len(self.enrolled)
        return [f"{lacking} more"] if lacking > 0 else []

    @property
    def num_expected(self) -> int:
        """How many take part once all are there."""
        return len(self.expected) or self._num_clients or 0

    def admit(self, member: Member, *, may_change: bool = True) -> Member:
        """Take in a client that has proved that it holds its key.

        Args:
            member: who it is.
            may_change: whether the client's data may be others than when it enrolled before.

        Returns:
            The member.

        Raises:
            TurnedAway: it may not take part.
        """
        name = member.name
        if name in self.removed:
            raise TurnedAway(f'"{name}" was removed from this run', fix="start a run of its own with this client")
        if self.expected and name not in self.expected:
            raise TurnedAway(
                f'no client "{name}" is expected', fix="ask the server's operator to add the name to federation.clients"
            )
        is_full = self._num_clients is not None and not self.expected and not self.awaited()
        if is_full and name not in self.enrolled:
            raise TurnedAway(
                f"the federation has all its {self._num_clients} clients",
                fix="ask the server's operator to raise num_clients",
            )
        if member.public_key != (self._key_of(name) or member.public_key):
            raise TurnedAway(
                f'the name "{name}" is another\'s: the key is not the one that the server knows for it',
                fix="join with your own name and your own key",
            )
        before = self.enrolled.get(name)
        if before is not None and before.facts != member.facts and not may_change:
            raise TurnedAway(
                f'the data, threads or device of "{name}" are not those that it enrolled with',
                fix="join with the same data, or ask the server's operator to start the same command again",
            )
        self._first_keys.setdefault(name, member.public_key)
        self.enrolled[name] = member
        self._is_written = False
        return member

    def remove(self, name: str) -> None:
        """Forget a client for good; its name is not let in again.

        Args:
            name: the client.
        """
        self.enrolled.pop(name, None)
        self.removed.add(name)
        self._is_written = False
        self.save()

    def save(self) -> None:
        """Write down who has enrolled since the last time; who is lost by a crash before that enrols again."""
        if self.path is not None and not self._is_written:
            table = {
                "agreement": self.agreement,
                "keys": self._first_keys,
                "removed": sorted(self.removed),
                "clients": {name: asdict(member) for name, member in self.enrolled.items()},
            }
            write_atomically(self.path, json.dumps(table, indent=1, sort_keys=True).encode())
        self._is_written = True


def digest_in(path: Path) -> str:
    """The digest of the agreement that a file of members was written under.

    Args:
        path: the file.

    Raises:
        JournalError: it is damaged.
    """
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["agreement"])
    except (OSError, ValueError, KeyError, TypeError):
        raise _unreadable(path) from None


def _unreadable(path: Path) -> JournalError:
    return JournalError(
        "the list of members cannot be read",
        where=str(path),
        fix="delete it: the clients enrol or contribute again, and the journal keeps what they sent",
    )
