"""Another runtime of which only some clients are asked; the journal answers for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fedfuse.core.client import ClientSide, Reply, Request
from fedfuse.core.cohort import ClientFacts, Runtime
from fedfuse.core.errors import ConfigError
from fedfuse.core.registry import RUNTIMES, register_runtime
from fedfuse.core.settings import from_json

NOT_ASKED = "its answer is not in the journal, and it is not to be asked"


@register_runtime("selected")
@dataclass(frozen=True, kw_only=True)
class Selected:
    """Only some clients of another runtime are asked; the run's own journal answers for the others.

    Args:
        inner: ``name`` and settings of the runtime that carries the requests.
        asks: ids of the clients that may be asked.
    """

    inner: dict[str, Any] = field(default_factory=lambda: {"name": "local"})
    asks: list[str] = field(default_factory=list)

    def _settings(self) -> Any:
        settings = dict(self.inner)
        name = settings.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError(
                'the setting "name" is missing', where="runtime.inner.name", fix=f"known: {', '.join(RUNTIMES.names())}"
            )
        return from_json(RUNTIMES.get(name), settings, where="runtime.inner")

    def client_device(self) -> torch.device:
        """The device that clients compute on."""
        settings = self._settings()
        return settings.client_device() if hasattr(settings, "client_device") else torch.device("cpu")

    @property
    def client_threads(self) -> int:
        """Torch threads of a client's computation."""
        return int(getattr(self._settings(), "client_threads", 1))

    def open(self, sides: Mapping[str, ClientSide]) -> SelectedRuntime:
        """Start the inner runtime.

        Args:
            sides: client id to its machine.
        """
        return SelectedRuntime(self._settings().open(sides), frozenset(self.asks))


class SelectedRuntime:
    """The running form of :class:`Selected`.

    Args:
        inner: carries the requests.
        asks: ids of the clients that may be asked.
    """

    def __init__(self, inner: Runtime, asks: frozenset[str]) -> None:
        self._inner, self._asks = inner, asks

    def clients(self) -> Mapping[str, ClientFacts]:
        """All clients by id."""
        return self._inner.clients()

    def exchange(
        self, requests: Sequence[Request], *, timeout_s: float | None, progress: Callable[[str, int, int], None]
    ) -> Iterator[Reply]:
        """Carry out the requests to those that may be asked.

        Args:
            requests: what the run's own journal does not hold.
            timeout_s: most seconds that one client may take.
            progress: called with (client id, done, total).

        Yields:
            A reply per request; a failed one for a client that is not asked.
        """
        for request in requests:
            if request.client_id not in self._asks:
                yield Reply(request.client_id, error=NOT_ASKED)
        present = [request for request in requests if request.client_id in self._asks]
        if present:
            yield from self._inner.exchange(present, timeout_s=timeout_s, progress=progress)

    def close(self) -> None:
        """Stop the inner runtime."""
        self._inner.close()
