"""The ledger: sums that a reader can redo by hand."""

from __future__ import annotations

from fedfuse.core.ledger import Ledger, LedgerEntry


def filled() -> Ledger:
    ledger = Ledger()
    ledger.add(LedgerEntry("one", "b", 10, 1, 0.5, False), peak_rss_bytes=7)
    ledger.add(LedgerEntry("one", "a", 20, 2, 1.0, True), peak_rss_bytes=9)
    ledger.add(LedgerEntry("zero", "a", 30, 3, 0.25, False), peak_rss_bytes=8)
    return ledger


def test_totals() -> None:
    assert filled().totals(artifact_bytes=100) == {
        "upload_bytes": 30.0,
        "download_bytes": 3.0,
        "upload_bytes_total": 60,
        "upload_wire_bytes_total": 0,
        "download_wire_bytes_total": 0,
        "download_bytes_total": 6,
        "exchanges": 2,
        "storage_bytes": 160,
        "artifact_bytes": 100,
        "client_seconds": 1.75,
    }
    assert filled().peak_client_rss_bytes == 9


def test_an_empty_ledger_has_totals_too() -> None:
    totals = Ledger().totals()
    assert set(totals.values()) == {0}
    assert Ledger().to_json() == {"entries": [], "totals": totals}


def test_exchanges_stand_in_the_order_of_asking_and_clients_in_the_order_of_their_ids() -> None:
    ledger = filled()
    assert ledger.exchanges() == ["one", "zero"]
    found = ledger.to_json()
    assert [(entry["exchange"], entry["client"]) for entry in found["entries"]] == [
        ("one", "a"),
        ("one", "b"),
        ("zero", "a"),
    ]
    assert found["entries"][1] == {
        "exchange": "one",
        "client": "b",
        "upload_bytes": 10,
        "download_bytes": 1,
        "seconds": 0.5,
        "from_journal": False,
        "upload_wire_bytes": 0,
        "download_wire_bytes": 0,
    }
    assert found["totals"] == ledger.totals()
