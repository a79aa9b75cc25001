"""What a contribution says it cost goes into the run's folder, so it must be numbers that everybody can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedfuse.core.errors import SealError
from fedfuse.core.payload import Payload
from fedfuse.core.sealing import SigningKey, seal
from fedfuse.runtimes.files import Contribution

KEY = SigningKey.generate()
MANIFEST = {
    "kind": "contribution",
    "client": "a",
    "facts": {"fingerprint": "f", "num_threads": 1, "device": "cpu", "num_examples": 3},
    "made_at_s": 5.0,
    "exchange": "first",
    "answer_key": "0" * 40,
    "seconds": 1.5,
    "peak_rss_bytes": 10,
}


def read(folder: Path, **changes: Any) -> Contribution:
    path = folder / "a.fed"
    path.write_bytes(seal({**MANIFEST, **changes}, {"upload": Payload({"n": 1}).encode()}, KEY))
    return Contribution.read(str(path), max_upload_bytes=1 << 20)[0]


def test_costs_are_read(tmp_path: Path) -> None:
    found = read(tmp_path, seconds=0, peak_rss_bytes=7)
    assert (found.seconds, found.peak_rss_bytes, found.made_at_s) == (0.0, 7, 5.0)


@pytest.mark.parametrize("key", ["seconds", "peak_rss_bytes", "made_at_s"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 10**400, "x", None, [1]], ids=repr)
def test_costs_that_are_no_amount_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(SealError) as caught:
        read(tmp_path, **{key: value})
    assert str(caught.value) == (
        f"its manifest is no contribution's\n  where: {tmp_path / 'a.fed'}\n  fix:   ask the client to make it again"
    )
