"""Files by path and by URL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedfuse.core.errors import ConfigError
from fedfuse.core.storage import is_url, list_files, read_file, write_file


@pytest.fixture(params=["path", "url"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "path":
        yield str(tmp_path)
        return
    fsspec = pytest.importorskip("fsspec")
    yield "memory:///bucket"
    if fsspec.filesystem("memory").exists("/bucket"):
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_what_is_written_is_read_and_listed(root: str) -> None:
    write_file(f"{root}/b.fed", b"2")
    write_file(f"{root}/deeper/a.fed", b"1")
    write_file(f"{root}/other.txt", b"")
    write_file(f"{root}/.half.fed", b"")
    found = list_files(root, ".fed")
    assert found == [f"{root}/b.fed", f"{root}/deeper/a.fed"]
    assert [read_file(place, max_bytes=1) for place in found] == [b"2", b"1"]


def test_large_files_are_not_read(root: str) -> None:
    write_file(f"{root}/a.fed", b"123")
    with pytest.raises(ConfigError, match="3 bytes are more than the limit of 2") as caught:
        read_file(f"{root}/a.fed", max_bytes=2)
    assert caught.value.where == f"{root}/a.fed"


def test_places_that_are_not_there(root: str) -> None:
    with pytest.raises(ConfigError, match="the place cannot be used: "):
        read_file(f"{root}/nothing.fed", max_bytes=1)


def test_folders_and_kinds_of_places_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such folder"):
        list_files(str(tmp_path / "nothing"), ".fed")
    for use in (lambda: list_files("nosuch://x", ".fed"), lambda: write_file("nosuch://x/y", b"")):
        with pytest.raises(ConfigError, match="this kind of place cannot be reached: Protocol not known: nosuch"):
            use()


def test_urls() -> None:
    assert is_url("s3://bucket/inbox")
    assert not is_url("inbox/a.fed")
