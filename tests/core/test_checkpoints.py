"""What long server work keeps on disk."""

from __future__ import annotations

from pathlib import Path

import torch

from fedfuse.core.checkpoints import Checkpoints
from fedfuse.core.payload import Payload


def test_what_was_kept_comes_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "kept", "question")
    assert checkpoints.load("state") is None
    checkpoints.save("state", Payload({"a": torch.arange(3), "epoch": 2}))
    found = checkpoints.load("state")
    assert found is not None
    assert sorted(found) == ["a", "epoch"]
    assert torch.equal(found.tensor("a"), torch.arange(3))
    checkpoints.save("state", Payload({"epoch": 3}))
    again = checkpoints.load("state")
    assert again is not None
    assert again.number("epoch") == 3


def test_another_question_gets_nothing(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "question")
    checkpoints.child("a", "b").save("state", Payload({"epoch": 2}))
    assert checkpoints.load("state") is None
    assert checkpoints.child("b", "a").load("state") is None
    assert Checkpoints(tmp_path, "another").child("a", "b").load("state") is None
    assert checkpoints.child("a", "b").load("state") is not None


def test_a_damaged_file_counts_as_none(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "question")
    checkpoints.save("state", Payload({"a": torch.arange(1000)}))
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert checkpoints.load("state") is None
    path.write_bytes(b"no payload")
    assert checkpoints.load("state") is None


def test_without_a_folder_nothing_is_kept() -> None:
    checkpoints = Checkpoints()
    checkpoints.save("state", Payload({"epoch": 2}))
    assert checkpoints.load("state") is None
    checkpoints.clear()


def test_clearing_removes_what_was_kept_and_only_that(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "kept", "question")
    checkpoints.clear()
    checkpoints.save("state", Payload({"epoch": 2}))
    checkpoints.save("pool_0", Payload({"epoch": 2}))
    checkpoints.clear()
    assert not (tmp_path / "kept").exists()
    checkpoints.save("state", Payload({"epoch": 2}))
    (tmp_path / "kept" / "mine.txt").write_text("mine")
    checkpoints.clear()
    assert [file.name for file in (tmp_path / "kept").iterdir()] == ["mine.txt"]
