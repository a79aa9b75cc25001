"""The account of what crossed: bytes by encoded size, per client and exchange, up and down."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LedgerEntry:
    """One question and its answer.

    Args:
        exchange: key of the exchange.
        client: client id.
        upload_bytes: encoded size of the reply; 0 if none was accepted.
        download_bytes: encoded size of the message.
        seconds: time the client's task took when it was carried out.
        from_journal: whether the answer was there already. Such an answer counts as if it had been given now.
        upload_wire_bytes: bytes that crossed to bring the reply, with everything around it; 0 where nobody measured.
        download_wire_bytes: bytes that crossed to bring the message; 0 where nobody measured.
    """

    exchange: str
    client: str
    upload_bytes: int
    download_bytes: int
    seconds: float
    from_journal: bool
    upload_wire_bytes: int = 0
    download_wire_bytes: int = 0


class Ledger:
    """Counts what crosses in one run; the method never counts for itself."""

    def __init__(self) -> None:
        self.entries: list[LedgerEntry] = []
        self.peak_client_rss_bytes = 0
        self._stored_bytes = 0

    def add(self, entry: LedgerEntry, peak_rss_bytes: int = 0, *, stored_bytes: int | None = None) -> None:
        """Count one question.

        Args:
            entry: what crossed.
            peak_rss_bytes: most memory of the client's process.
            stored_bytes: what the server keeps of it; the upload if left out.
        """
        self.entries.append(entry)
        self._stored_bytes += entry.upload_bytes if stored_bytes is None else stored_bytes
        self.peak_client_rss_bytes = max(self.peak_client_rss_bytes, peak_rss_bytes)

    def exchanges(self) -> list[str]:
        """Keys of the exchanges in the order of asking."""
        return list(dict.fromkeys(entry.exchange for entry in self.entries))

    def totals(self, artifact_bytes: int = 0) -> dict[str, Any]:
        """The sums that reports show.

        Args:
            artifact_bytes: size of the fused model, which the server stores too.

        Returns:
            ``upload_bytes`` and ``download_bytes`` are means per client; ``*_total`` are sums over clients;
            ``storage_bytes`` is the peak of what the server holds: every upload of the run and the artifact.
            ``*_wire_bytes_total`` is what really crossed where a network was between; 0 where there was none.
        """
        clients = len({entry.client for entry in self.entries}) or 1
        up = sum(entry.upload_bytes for entry in self.entries)
        down = sum(entry.download_bytes for entry in self.entries)
        return {
            "upload_bytes": up / clients,
            "download_bytes": down / clients,
            "upload_bytes_total": up,
            "download_bytes_total": down,
            "upload_wire_bytes_total": sum(entry.upload_wire_bytes for entry in self.entries),
            "download_wire_bytes_total": sum(entry.download_wire_bytes for entry in self.entries),
            "exchanges": len(self.exchanges()),
            "storage_bytes": self._stored_bytes + artifact_bytes,
            "artifact_bytes": artifact_bytes,
            "client_seconds": sum(entry.seconds for entry in self.entries),
        }

    def to_json(self) -> dict[str, Any]:
        """All entries, in order of exchange and client, and the totals."""
        order = {key: i for i, key in enumerate(self.exchanges())}
        entries = sorted(self.entries, key=lambda entry: (order[entry.exchange], entry.client))
        return {"entries": [asdict(entry) for entry in entries], "totals": self.totals()}
