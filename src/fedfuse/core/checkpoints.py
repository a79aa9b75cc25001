"""Where long server work keeps what it has, so that a killed run goes on there."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fedfuse.core.errors import PayloadError
from fedfuse.core.files import write_atomically
from fedfuse.core.payload import Payload


@dataclass(frozen=True)
class Checkpoints:
    """Named payloads on disk, each valid for one question only.

    Args:
        folder: where; ``None`` keeps nothing.
        question: digest of all that decides the work; what was kept for another question is not given back.
    """

    folder: Path | None = None
    question: str = ""

    def child(self, *parts: str) -> Checkpoints:
        """Checkpoints of a part of the work.

        Args:
            parts: what else decides it, such as a digest of its inputs.
        """
        text = "|".join([self.question, *parts])
        return Checkpoints(self.folder, hashlib.sha256(text.encode()).hexdigest())

    def load(self, name: str) -> Payload | None:
        """What was kept under a name.

        Args:
            name: of the checkpoint.

        Returns:
            ``None`` if there is nothing whole, or nothing for this question.
        """
        if self.folder is None:
            return None
        try:
            kept = Payload.decode((self.folder / f"{name}.safetensors").read_bytes())
        except (OSError, PayloadError):
            return None
        if kept.get("question") != self.question:
            return None
        del kept["question"]
        return kept

    def save(self, name: str, payload: Payload) -> None:
        """Keep a payload under a name, instead of what was there.

        Args:
            name: of the checkpoint.
            payload: what to keep.
        """
        if self.folder is not None:
            whole = Payload({**payload, "question": self.question})
            write_atomically(self.folder / f"{name}.safetensors", whole.encode(), syncs_folder=False)

    def clear(self) -> None:
        """Remove what was kept; called when the work is done."""
        if self.folder is not None and self.folder.is_dir():
            for file in self.folder.glob("*.safetensors"):
                file.unlink()
            if not any(self.folder.iterdir()):
                self.folder.rmdir()
