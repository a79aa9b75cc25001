"""The journal alone: repeats or audits a run, or fuses again with another method, with no client at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedfuse.core.client import ClientSide, Reply, Request
from fedfuse.core.cohort import ClientFacts
from fedfuse.core.registry import register_runtime


@register_runtime("replay")
@dataclass(frozen=True, kw_only=True)
class Replay:
    """Answers from the journal only; what is not there is missing.

    Args:
        client_threads: torch threads that the clients computed with in the run that is replayed.
        device: kind of device that they computed on.
    """

    client_threads: int = 1
    device: str = "cpu"

    def open(self, sides: Mapping[str, ClientSide]) -> ReplayRuntime:
        """Start the runtime.

        Args:
            sides: client id to its machine; only the fingerprints of the data are looked at.
        """
        facts = {
            client_id: ClientFacts(side.data.fingerprint, self.client_threads, self.device)
            for client_id, side in sorted(sides.items())
        }
        return ReplayRuntime(facts)


class ReplayRuntime:
    """The running form of :class:`Replay`.

    Args:
        clients: what the server knew of the clients.
    """

    def __init__(self, clients: Mapping[str, ClientFacts]) -> None:
        self._clients = dict(sorted(clients.items()))

    def clients(self) -> Mapping[str, ClientFacts]:
        """All clients by id."""
        return self._clients

    def exchange(
        self, requests: Sequence[Request], *, timeout_s: float | None, progress: Callable[[str, int, int], None]
    ) -> Iterator[Reply]:
        """Say for each request that the journal has no answer: those that it has never come here.

        Args:
            requests: what the journal does not hold.
            timeout_s: not used.
            progress: not used.

        Yields:
            A failed reply per request.
        """
        for request in requests:
            yield Reply(request.client_id, error="the journal holds no answer to this question")

    def close(self) -> None:
        """Nothing to free."""
