from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedfuse.data.cache import cache_folder, cache_path, cached, files_digest, read_cached


def _make() -> Tensor:
    return torch.arange(12, dtype=torch.uint8).view(3, 4)


def _never() -> Tensor:
    raise AssertionError("the cache should have answered")


def test_a_tensor_is_made_once(own_cache: Path) -> None:
    assert cache_folder() == own_cache
    path = cache_path("a", 1, None)
    assert read_cached(path) is None
    assert torch.equal(cached(path, _make), _make())
    assert torch.equal(cached(path, _never), _make())


@pytest.mark.parametrize("damage", [b"", b"\x00" * 40, b"not a payload at all"])
def test_a_damaged_file_is_made_anew_in_silence(damage: bytes) -> None:
    path = cache_path("b")
    cached(path, _make)
    path.write_bytes(damage)
    assert torch.equal(cached(path, _make), _make())
    assert torch.equal(cached(path, _never), _make())


def test_a_single_wrong_bit_is_seen() -> None:
    path = cache_path("c")
    cached(path, _make)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert read_cached(path) is None


def test_a_cache_that_cannot_be_written_only_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEDFUSE_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="decoded data is not kept in .*; set FEDFUSE_CACHE to another folder"):
        assert torch.equal(cached(cache_path("d"), _make), _make())


def test_a_changed_file_has_another_digest(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_text("1")
    before = files_digest([file])
    file.write_text("22")
    assert files_digest([file]) != before
