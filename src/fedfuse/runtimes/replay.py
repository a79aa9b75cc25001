"""The journal alone: repeats or audits a run, or fuses again with another method, with no client at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedfuse.core.client import ClientSide, Reply, Request
from fedfuse.core.cohort import ClientFacts
from fedfuse.core.errors import ConfigError
from fedfuse.core.journal import Journal
from fedfuse.core.registry import register_runtime


@register_runtime("replay")
@dataclass(frozen=True, kw_only=True)
class Replay:
    """Answers from a journal only; what is not there is missing.

    Args:
        journal: folder of an earlier run or its journal; left out, the journal of the run's own folder.
        client_threads: torch threads that the clients computed with in the run that is replayed.
        device: kind of device that they computed on.
    """

    journal: str | None = None
    client_threads: int = 1
    device: str = "cpu"

    def open(self, sides: Mapping[str, ClientSide]) -> ReplayRuntime:
        """Start the runtime.

        Args:
            sides: client id to its machine; only the fingerprints of the data are looked at.

        Raises:
            ConfigError: there is no such journal.
        """
        facts = {
            client_id: ClientFacts(side.data.fingerprint, self.client_threads, self.device)
            for client_id, side in sorted(sides.items())
        }
        source = None
        if self.journal is not None:
            folder = Path(self.journal)
            folder = folder / "journal" if (folder / "journal").is_dir() else folder
            if not folder.is_dir():
                raise ConfigError(
                    "there is no journal", where="runtime.journal", fix="name the folder of an earlier run"
                )
            source = Journal(folder, locks=False)
        return ReplayRuntime(facts, source)


class ReplayRuntime:
    """The running form of :class:`Replay`.

    Args:
        clients: what the server knew of the clients.
        source: a journal beside the run's own.
    """

    def __init__(self, clients: Mapping[str, ClientFacts], source: Journal | None = None) -> None:
        self._clients, self._source = dict(sorted(clients.items())), source

    def clients(self) -> Mapping[str, ClientFacts]:
        """All clients by id."""
        return self._clients

    def exchange(
        self, requests: Sequence[Request], *, timeout_s: float | None, progress: Callable[[str, int, int], None]
    ) -> Iterator[Reply]:
        """Answer from the other journal. What the run's own journal holds never comes here.

        Args:
            requests: what the run's own journal does not hold.
            timeout_s: not used.
            progress: not used.

        Yields:
            A reply per request; a failed one where the journal has no answer.
        """
        for request in requests:
            entry = self._source.get(request.answer_key) if self._source else None
            if entry is None:
                yield Reply(request.client_id, error="the journal holds no answer to this question")
            else:
                upload = entry.path.read_bytes() if entry.path else entry.data
                seconds, peak = float(entry.facts["seconds"]), int(entry.facts["peak_rss_bytes"])
                yield Reply(request.client_id, upload, seconds=seconds, peak_rss_bytes=peak, answer_key=entry.key)

    def close(self) -> None:
        """Let the other journal go."""
        if self._source is not None:
            self._source.close()
