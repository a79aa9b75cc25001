"""Every reply, kept under the digest of the question: crash-safe, and answered once for all methods that ask it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfuse.core.errors import FedfuseError, JournalError
from fedfuse.core.files import write_atomically
from fedfuse.core.payload import Payload, PayloadFile, Value


def content_key(facts: Mapping[str, Any]) -> str:
    """Digest of a question: the task, its settings, what was sent, the data's fingerprint, the seed.

    Args:
        facts: JSON.

    Returns:
        40 hexadecimal digits.
    """
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:40]


@dataclass(frozen=True)
class Entry:
    """One reply in the journal.

    Args:
        key: content key.
        facts: exchange, client, task, seconds, bytes and digest of the upload.
        path: the upload's file; ``None`` if it is held in memory.
        data: the upload's bytes where there is no file.
        view: turns what crossed into the upload, where it was coded.
    """

    key: str
    facts: Mapping[str, Any]
    path: Path | None = None
    data: bytes = b""
    view: Callable[[Mapping[str, Value]], Mapping[str, Value]] | None = None

    def open(self) -> Mapping[str, Value]:
        """The upload, read lazily from its file where there is one."""
        crossed = PayloadFile(self.path) if self.path else Payload.decode(self.data)
        return crossed if self.view is None else self.view(crossed)

    def payload(self) -> Payload:
        """The whole upload in memory."""
        crossed = Payload.decode(self.path.read_bytes() if self.path else self.data)
        return crossed if self.view is None else Payload(self.view(crossed))


class Journal:
    """Replies by content key, in a folder or in memory.

    A reply counts once its second file, the facts, is there; both are written whole or not at all. An entry whose
    bytes do not agree with its digest is set aside and asked for again.

    Args:
        folder: made if it is not there; ``None`` keeps everything in memory.
        locks: keep other processes out; without it the folder is only read.

    Raises:
        JournalError: another process is using the folder.
    """

    def __init__(self, folder: Path | None = None, *, locks: bool = True) -> None:
        self.folder = folder
        self._memory: dict[str, Entry] = {}
        self._checked: set[str] = set()
        self._lock: int | None = None
        self.broken: list[str] = []
        if folder is not None and locks:
            self._acquire(folder)

    def _acquire(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise JournalError(
                f"cannot use the journal: {error.strerror}", where=str(folder), fix="name another --out folder"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            self._lock = None
            raise JournalError(
                "another fedfuse process is using this folder",
                where=str(folder),
                fix="wait for it, stop it, or name another --out folder",
            ) from None

    def close(self) -> None:
        """Let other processes use the folder."""
        if self._lock is not None:
            # Unlocked by hand: worker processes have inherited the open file and would keep the lock.
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, key: str) -> Entry | None:
        """The entry of that key, or nothing if it was never answered or is damaged.

        Args:
            key: content key.
        """
        if self.folder is None:
            return self._memory.get(key)
        path, facts_path = self.folder / f"{key}.safetensors", self.folder / f"{key}.json"
        try:
            facts = json.loads(facts_path.read_text(encoding="utf-8"))
            if path.stat().st_size != facts["upload_bytes"]:
                raise ValueError("size")
            if key not in self._checked:
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                        raise ValueError("digest")
                PayloadFile(path)
                self._checked.add(key)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, FedfuseError):
            facts_path.rename(facts_path.with_suffix(".broken"))
            self.broken.append(key)
            return None
        return Entry(key, facts, path)

    def put(self, key: str, upload: bytes, facts: Mapping[str, Any]) -> Entry:
        """Write a reply; when this returns it survives a crash.

        Args:
            key: content key.
            upload: the encoded payload, already checked.
            facts: JSON to keep beside it.

        Returns:
            The entry.
        """
        facts = {**facts, "sha256": hashlib.sha256(upload).hexdigest(), "upload_bytes": len(upload)}
        if self.folder is None:
            entry = Entry(key, facts, data=upload)
            self._memory[key] = entry
            return entry
        path = self.folder / f"{key}.safetensors"
        write_atomically(path, upload, syncs_folder=False)
        write_atomically(self.folder / f"{key}.json", json.dumps(facts, sort_keys=True).encode())
        self._checked.add(key)
        return Entry(key, facts, path)

    def entries(self) -> list[Entry]:
        """All whole entries, by key."""
        if self.folder is None:
            return [self._memory[key] for key in sorted(self._memory)]
        keys = sorted(path.stem for path in self.folder.glob("*.json"))
        return [entry for key in keys if (entry := self.get(key)) is not None]
