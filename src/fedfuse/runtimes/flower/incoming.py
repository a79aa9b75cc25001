"""A large answer while it comes in piece by piece; pieces that are there survive a restart of the server."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from fedfuse.core.errors import JournalError, SealError
from fedfuse.core.files import write_atomically


class Incoming:
    """The pieces of one answer.

    Args:
        folder: of this answer's pieces; ``None`` keeps them in memory.
        num_bytes: of the whole answer.
        sha256: of the whole answer.
        chunk_bytes: of a piece.
    """

    def __init__(self, folder: Path | None, num_bytes: int, sha256: str, chunk_bytes: int) -> None:
        self.folder, self.num_bytes, self.sha256, self.chunk_bytes = folder, num_bytes, sha256, chunk_bytes
        self._memory: dict[int, bytes] = {}
        self._there = {offset for offset, size in self._pieces() if self._is_whole(self._path(offset), size)}
        if folder is not None and folder.is_dir():
            wanted = {self._path(offset).name for offset, _ in self._pieces()}
            # Of an answer that was another one, or was cut in other pieces.
            for path in folder.iterdir():
                if path.name not in wanted:
                    path.unlink(missing_ok=True)

    @property
    def received_bytes(self) -> int:
        """Bytes that are there."""
        return sum(size for offset, size in self._pieces() if offset in self._there)

    def missing(self) -> tuple[int, int] | None:
        """Offset and size of the first piece that is not there; nothing once all are."""
        return next(((offset, size) for offset, size in self._pieces() if offset not in self._there), None)

    def add(self, offset: int, piece: bytes) -> None:
        """Keep a piece.

        Args:
            offset: where in the answer it begins.
            piece: its bytes.

        Raises:
            SealError: it is not as long as it must be.
        """
        size = dict(self._pieces()).get(offset)
        if size != len(piece):
            raise SealError(
                f"a piece of the answer has {len(piece):,} bytes, not {size or 0:,}", fix="the client must join anew"
            )
        if self.folder is None:
            self._memory[offset] = piece
        else:
            write_atomically(self._path(offset), piece, syncs_folder=False)
        self._there.add(offset)

    def whole(self) -> bytes:
        """The answer.

        Raises:
            SealError: the pieces do not make the answer that was announced.
            JournalError: a piece can no longer be read.
        """
        try:
            parts = [
                self._memory[offset] if self.folder is None else self._path(offset).read_bytes()
                for offset, _ in self._pieces()
            ]
        except OSError as error:
            raise JournalError(
                f"cannot read a piece of an answer: {error.strerror}",
                where=str(self.folder),
                fix="run the same command again",
            ) from None
        data = b"".join(parts)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            self.remove()
            raise SealError("the pieces do not make the answer that was announced", fix="the client must join anew")
        return data

    def remove(self) -> None:
        """Forget the pieces."""
        self._memory.clear()
        self._there.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _pieces(self) -> Iterator[tuple[int, int]]:
        for offset in range(0, self.num_bytes, self.chunk_bytes):
            yield offset, min(self.chunk_bytes, self.num_bytes - offset)

    def _path(self, offset: int) -> Path:
        return (self.folder or Path()) / f"{self.sha256[:16]}-{offset}-{self.chunk_bytes}.part"

    def _is_whole(self, path: Path, size: int) -> bool:
        return self.folder is not None and path.is_file() and path.stat().st_size == size
