"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fedfuse.core.errors import JournalError
from fedfuse.core.files import remove_unfinished, write_atomically

FIX = "\n  fix:   free disk space or name another folder, then run the same command again"


def fail(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_written_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert [each.name for each in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_part_of_the_new_one(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(JournalError) as caught:
        write_atomically(path, b"new")
    assert str(caught.value) == f"cannot write: No space left on device\n  where: {path}" + FIX
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, open_descriptor = tmp_path / "file", os.fdopen

    def full(descriptor: int, mode: str) -> object:
        os.close(descriptor)
        return open_descriptor(os.open("/dev/full", os.O_WRONLY), mode)

    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(JournalError) as caught:
        write_atomically(path, b"x" * 100_000)
    assert caught.value.what == "cannot write: No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told_the_same_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "inner" / "x"
    with pytest.raises(JournalError) as caught:
        write_atomically(path, b"")
    assert str(caught.value) == f"cannot write: Not a directory\n  where: {path}" + FIX


def test_what_is_written_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    # Temporary files are private by default; an artifact is made to be handed on.
    before = os.umask(0o022)
    try:
        write_atomically(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a" / "whole.safetensors", b"whole")
    write_atomically(tmp_path / "b.part", b"named so by somebody")
    left = [tmp_path / ".x.json.k2.part", tmp_path / "a" / ".whole.safetensors.q8.part"]
    for path in left:
        path.write_bytes(b"half")
    remove_unfinished(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["b.part", "whole.safetensors"]
    remove_unfinished(tmp_path / "not there")
