"""What client and server both know: what was sent, and the model's first weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.payload import Payload

STATISTICS = ("running_mean", "running_var")
"""Last words of the names of what normalisation layers count instead of learning."""

_MODEL = "model/"


class Known:
    """Tensors that both sides hold, so that a change of them is enough to tell the new one.

    Args:
        message: what the client was sent.
        first: gives the model's first weights by name; called at most once.
    """

    def __init__(self, message: Payload, first: Callable[[], Mapping[str, Tensor]]) -> None:
        self._message, self._make = message, first
        self._first: Mapping[str, Tensor] | None = None

    @classmethod
    def of(cls, message: bytes, model: ModelSpec) -> Known:
        """What a client knows.

        Args:
            message: encoded.
            model: the one that it owns.
        """
        return cls(Payload.decode(message), lambda: model.build().state_dict())

    def start(self, key: str) -> Tensor | None:
        """The tensor that one of an upload began as: what was sent under its key, or the first weights.

        Args:
            key: of the upload.

        Returns:
            Nothing where neither side could know.
        """
        found = self._message.get(key)
        if isinstance(found, Tensor):
            return found
        if not key.startswith(_MODEL):
            return None
        if self._first is None:
            self._first = self._make()
        return self._first.get(key.removeprefix(_MODEL))

    def start_of(self, key: str, value: Tensor) -> Tensor | None:
        """The start of a tensor, if it has the same shape and dtype.

        Args:
            key: of the upload.
            value: what the upload holds there.

        Returns:
            On the device of the value.
        """
        found = self.start(key)
        if found is None or found.shape != value.shape or found.dtype != value.dtype:
            return None
        return found.to(value.device)
