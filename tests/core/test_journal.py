"""The journal: replies that survive crashes, and only whole ones."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedfuse.core.errors import JournalError
from fedfuse.core.journal import Journal, content_key
from fedfuse.core.payload import Payload, PayloadFile

PAYLOAD = Payload({"w/x": torch.arange(3.0), "n": 2})
DATA = PAYLOAD.encode()
KEY, OTHER = "a" * 40, "b" * 40

IN_USE = (
    "another fedfuse process is using this folder\n  where: {}\n"
    "  fix:   wait for it, stop it, or name another --out folder"
)


def filled(folder: Path | None) -> Journal:
    journal = Journal(folder)
    journal.put(KEY, DATA, {"client": "c"})
    return journal


@pytest.fixture(params=["folder", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "journal" if request.param == "folder" else None


def test_what_is_put_is_got(folder: Path | None) -> None:
    with filled(folder) as journal:
        entry = journal.get(KEY)
        assert entry is not None
        assert entry.facts == {"client": "c", "sha256": hashlib.sha256(DATA).hexdigest(), "upload_bytes": len(DATA)}
        assert entry.payload().encode() == DATA
        assert dict(entry.open())["n"] == 2
        assert list(entry.open()) == list(PAYLOAD)
        assert journal.get(OTHER) is None
        assert [each.key for each in journal.entries()] == [KEY]


def test_entries_stand_in_the_order_of_their_keys(folder: Path | None) -> None:
    with Journal(folder) as journal:
        for key in (OTHER, KEY):
            journal.put(key, DATA, {})
        assert [entry.key for entry in journal.entries()] == [KEY, OTHER]


def test_a_folder_is_read_lazily_and_survives_its_journal(tmp_path: Path) -> None:
    filled(tmp_path).close()
    with Journal(tmp_path) as journal:
        entry = journal.get(KEY)
        assert entry is not None
        assert isinstance(entry.open(), PayloadFile)
        assert entry.payload().encode() == DATA


def test_a_second_journal_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    with Journal(tmp_path):
        with pytest.raises(JournalError) as caught:
            Journal(tmp_path)
        assert str(caught.value) == IN_USE.format(tmp_path)
    Journal(tmp_path).close()


def test_another_process_is_refused_too(tmp_path: Path) -> None:
    script = "import sys, pathlib; from fedfuse.core.journal import Journal; Journal(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", script, str(tmp_path)]
    with Journal(tmp_path):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "JournalError: " + IN_USE.format(tmp_path) in done.stderr


def test_a_forked_process_that_lives_on_does_not_keep_a_closed_journal_locked(tmp_path: Path) -> None:
    # Local workers inherit every open file of the process that forks them.
    journal = Journal(tmp_path)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=theirs.recv, daemon=True)
    process.start()
    try:
        journal.close()
        Journal(tmp_path).close()
    finally:
        ours.send(None)
        process.join()


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(JournalError) as caught:
        Journal(tmp_path / "file")
    assert str(caught.value) == (
        f"cannot use the journal: File exists\n  where: {tmp_path / 'file'}\n  fix:   name another --out folder"
    )


def test_closing_twice_is_fine(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.close()
    journal.close()


# --- damage


@pytest.mark.parametrize("damage", ["upload_bit", "upload_cut", "facts_cut", "facts_list", "facts_empty", "no_payload"])
def test_a_damaged_entry_is_set_aside_and_asked_for_again(damage: str, tmp_path: Path) -> None:
    filled(tmp_path).close()
    upload, facts = tmp_path / f"{KEY}.safetensors", tmp_path / f"{KEY}.json"
    if damage == "upload_bit":
        upload.write_bytes(DATA[:-1] + bytes([DATA[-1] ^ 1]))
    elif damage == "upload_cut":
        upload.write_bytes(DATA[:-1])
    elif damage == "facts_cut":
        facts.write_bytes(facts.read_bytes()[:-3])
    elif damage == "facts_list":
        facts.write_text("[]")
    elif damage == "facts_empty":
        facts.write_text("{}")
    else:
        upload.write_bytes(b"no payload")
        facts.write_text(json.dumps({"sha256": hashlib.sha256(b"no payload").hexdigest()}))
    with Journal(tmp_path) as journal:
        assert journal.entries() == []
        assert journal.broken == [KEY]
        assert journal.get(KEY) is None
        assert (tmp_path / f"{KEY}.broken").exists()
        journal.put(KEY, DATA, {})
        assert journal.get(KEY) is not None
    with Journal(tmp_path) as journal:
        assert journal.get(KEY) is not None
        assert journal.broken == []


def test_the_same_entry_may_be_damaged_twice(tmp_path: Path) -> None:
    for _ in range(2):
        filled(tmp_path).close()
        (tmp_path / f"{KEY}.json").write_text("{")
        with Journal(tmp_path) as journal:
            assert journal.get(KEY) is None


def test_an_entry_without_its_facts_was_never_answered(tmp_path: Path) -> None:
    # A process that is killed between the two files leaves this behind.
    filled(tmp_path).close()
    (tmp_path / f"{KEY}.json").unlink()
    with Journal(tmp_path) as journal:
        assert journal.get(KEY) is None
        assert journal.entries() == []
        assert journal.broken == []
        journal.put(KEY, DATA, {})
        assert journal.get(KEY) is not None


def test_an_entry_without_its_upload_was_never_answered(tmp_path: Path) -> None:
    filled(tmp_path).close()
    (tmp_path / f"{KEY}.safetensors").unlink()
    with Journal(tmp_path) as journal:
        assert journal.get(KEY) is None


def test_a_kill_between_the_two_files(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from fedfuse.core import journal; real = journal.write_atomically\n"
        "def write(path, data, **more):\n"
        "    if path.suffix == '.json': os.kill(os.getpid(), 9)\n"
        "    real(path, data, **more)\n"
        "journal.write_atomically = write\n"
        "journal.Journal(Path(sys.argv[1])).put('a' * 40, bytes.fromhex(sys.argv[2]), {})"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path), DATA.hex()], check=False)
    assert done.returncode == -9
    with Journal(tmp_path) as journal:
        assert (tmp_path / f"{KEY}.safetensors").exists()
        assert journal.get(KEY) is None


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_full_disk_is_told_and_leaves_no_part(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, upload = os.fsync, tmp_path / f"{KEY}.safetensors"

    def fsync(descriptor: int) -> None:
        # The facts are written once the upload is there.
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and upload.exists() is (suffix == ".json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with Journal(tmp_path) as journal:
        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(JournalError) as caught:
            journal.put(KEY, DATA, {})
        assert str(caught.value) == (
            f"cannot write: No space left on device\n  where: {tmp_path / KEY}{suffix}\n"
            "  fix:   free disk space or name another folder, then run the same command again"
        )
        assert list(tmp_path.glob("*.part")) + list(tmp_path.glob(".*.part")) == []
        assert journal.get(KEY) is None
        monkeypatch.undo()
        journal.put(KEY, DATA, {})
        assert journal.get(KEY) is not None


# --- content keys


def test_a_content_key_is_stable() -> None:
    facts = {"task": "a:b@c", "settings": {"x": 1, "y": [0.1, None, True]}}
    assert content_key(facts) == content_key(dict(reversed(facts.items())))
    text = '{"settings":{"x":1,"y":[0.1,null,true]},"task":"a:b@c"}'
    assert content_key(facts) == hashlib.sha256(text.encode()).hexdigest()[:40]


def test_a_content_key_sees_every_fact() -> None:
    variants = [{}, {"a": 1}, {"a": "1"}, {"a": 1.5}, {"b": 1}, {"a": {"b": 1}}, {"a": [1]}, {"a": True}]
    assert len({content_key(facts) for facts in variants}) == len(variants)
