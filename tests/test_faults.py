"""Kill -9 at any moment, damaged files: the same command continues, and the artifact is that of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import fedfuse
from fedfuse.core.errors import FedfuseError
from fedfuse.core.journal import Journal
from fedfuse.experiment import Observer

CONFIG: dict[str, Any] = {
    "seed": 4,
    "data": {
        "source": "digits",
        "limit": 500,
        "test_limit": 100,
        "partition": {"scheme": "dirichlet", "num_clients": 4, "dirichlet_alpha": 0.5},
    },
    "model": {"family": "cnn", "width": 8, "depth": 4},
    "method": {"name": "fusefl", "num_blocks": 2, "local": {"num_epochs": 10, "batch_size": 32}},
    "runtime": {"name": "local", "workers": 2},
    "server": {"threads": 1},
    # A limit of time needs processes that can be stopped, so workers are used from the first client on.
    "federation": {"timeout_s": 300},
}
NUM_REPLIES = 12
"""Two blocks and the moments of four clients."""


def digest(folder: Path) -> str:
    return str(json.loads((folder / "result.json").read_text())["artifact"]["digest"])


def replies(folder: Path) -> int:
    return len(list((folder / "journal").glob("*.json")))


def start(home: Path, folder: Path) -> subprocess.Popen[str]:
    path = home / "c.yaml"
    path.write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-m", "fedfuse.cli", "run", str(path), "--out", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def children(pid: int) -> set[int]:
    try:
        return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except OSError:
        return set()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], limit_s: float = 120.0) -> bool:
    """Whether the condition came true while the process was running."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end and process.poll() is None:
        if condition():
            return True
        time.sleep(0.005)
    return condition()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of a run that nothing happened to."""
    home = tmp_path_factory.mktemp("undisturbed")
    process = start(home, home / "run")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert replies(home / "run") == NUM_REPLIES
    return digest(home / "run")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes under /proc")
@pytest.mark.parametrize("num_replies", [0, 2, 5, 9])
def test_killed_at_any_moment_the_same_command_continues(num_replies: int, undisturbed: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(tmp_path, folder)
    # While the first clients train there is no reply yet, but there are workers.
    seen = wait_for(
        lambda: replies(folder) >= num_replies and (num_replies > 0 or bool(children(process.pid))), process
    )
    assert seen
    time.sleep(random.Random(num_replies).uniform(0.0, 0.2))
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if num_replies == 0:
        assert len(workers) == 2
    end = time.monotonic() + 10
    while any(is_running(pid) for pid in workers) and time.monotonic() < end:
        time.sleep(0.01)
    assert not [pid for pid in workers if is_running(pid)], "workers outlived the process that started them"

    kept = replies(folder)
    again = start(tmp_path, folder)
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert digest(folder) == undisturbed
    entries = json.loads((folder / "ledger.json").read_text())["entries"]
    assert len(entries) == NUM_REPLIES
    assert sum(entry["from_journal"] for entry in entries) == kept >= num_replies
    assert replies(folder) == NUM_REPLIES
    assert "damaged" not in err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes under /proc")
def test_killed_again_and_again_it_still_ends(undisturbed: str, tmp_path: Path) -> None:
    folder, moments = tmp_path / "run", random.Random(7)
    for _ in range(2):
        process = start(tmp_path, folder)
        before = replies(folder)
        wait_for(lambda before=before: replies(folder) > before, process)  # type: ignore[misc]
        time.sleep(moments.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    last = start(tmp_path, folder)
    _, err = last.communicate(timeout=300)
    assert last.returncode == 0, err
    assert digest(folder) == undisturbed


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes under /proc")
def test_a_killed_worker_costs_its_client_alone_and_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(tmp_path, folder)
    assert wait_for(lambda: len(children(process.pid)) == 2, process)
    time.sleep(0.05)
    os.kill(min(children(process.pid)), signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert '3 of 4 clients answered the exchange "block_0", 4 are needed' in err
    assert "its worker process died (exit code -9)" in err
    assert "run the same command again" in err
    again = start(tmp_path, folder)
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err


@pytest.mark.slow
def test_two_commands_do_not_share_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Journal(folder / "journal"):
        second = start(tmp_path, folder)
        _, err = second.communicate(timeout=300)
    assert second.returncode == 2
    assert err.startswith(
        "error: another fedfuse process is using this folder\n"
        f"  where: {folder / 'journal'}\n"
        "  fix:   wait for it, stop it, or name another --out folder\n"
    )
    assert replies(folder) == 0


# --- damaged files


SMALL: dict[str, Any] = {
    **CONFIG,
    "data": {**CONFIG["data"], "limit": 150, "test_limit": 50},
    "model": {"family": "mlp", "width": 8, "depth": 2},
    "method": {"name": "fusefl", "num_blocks": 2, "local": {"num_epochs": 2, "batch_size": 32}},
    "runtime": {"name": "local", "workers": 1},
    "federation": {},
}


class Notes(Observer):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def truncate(entry: Path) -> None:
    upload = entry.with_suffix(".safetensors")
    upload.write_bytes(upload.read_bytes()[:-3])


def empty(entry: Path) -> None:
    entry.with_suffix(".safetensors").write_bytes(b"")


def flip(entry: Path) -> None:
    upload = entry.with_suffix(".safetensors")
    data = bytearray(upload.read_bytes())
    data[-5] ^= 0x40
    upload.write_bytes(data)


def garble_facts(entry: Path) -> None:
    entry.write_text("{")


def no_table(entry: Path) -> None:
    entry.write_text("[]")


def delete_facts(entry: Path) -> None:
    entry.unlink()


def delete_upload(entry: Path) -> None:
    entry.with_suffix(".safetensors").unlink()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    fedfuse.run(SMALL, out=folder)
    return folder


@pytest.mark.parametrize("exchange", ["block_0", "moments"])
@pytest.mark.parametrize(
    ("damage", "is_told"),
    [
        (truncate, True),
        (empty, True),
        (flip, True),
        (garble_facts, True),
        (no_table, True),
        (delete_facts, False),
        (delete_upload, False),
    ],
)
def test_a_damaged_entry_is_asked_for_again(
    whole: Path, tmp_path: Path, damage: Callable[[Path], None], is_told: bool, exchange: str
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    facts = {path: json.loads(path.read_text()) for path in sorted((tmp_path / "journal").glob("*.json"))}
    entry = next(path for path, f in facts.items() if (f["exchange"], f["client"]) == (exchange, "client_2"))
    damage(entry)
    notes = Notes()
    again = fedfuse.run(SMALL, out=tmp_path, observer=notes)
    assert again.facts["artifact"]["digest"] == digest(whole)
    asked = [e for e in json.loads((tmp_path / "ledger.json").read_text())["entries"] if not e["from_journal"]]
    assert [(e["exchange"], e["client"]) for e in asked] == [(exchange, "client_2")]
    wanted = f"the journal's entry {entry.stem[:8]} was damaged and was asked for again"
    assert notes.texts == ([wanted] if is_told else [])


def test_unfinished_files_of_a_crash_are_not_looked_at(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / ".abc.safetensors.x1.part").write_bytes(b"half")
    (tmp_path / "journal" / f"{'0' * 40}.safetensors").write_bytes(b"an upload whose facts were never written")
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / ".model.safetensors.x2.part").write_bytes(b"half")
    assert fedfuse.run(SMALL, out=tmp_path).facts["artifact"]["digest"] == digest(whole)
    # Each crash would leave another one, as large as an upload or a model.
    assert not list(tmp_path.rglob("*.part"))


def test_a_damaged_result_is_made_again(tmp_path: Path) -> None:
    first = fedfuse.compare(SMALL, ["fusefl"], out=tmp_path)
    (tmp_path / "fusefl" / "seed_4" / "result.json").write_text("{", encoding="utf-8")
    again = fedfuse.compare(SMALL, ["fusefl"], out=tmp_path)
    assert again["rows"][0]["accuracies"] == first["rows"][0]["accuracies"]


@pytest.mark.parametrize("damage", ["gone", "truncated"])
def test_a_client_whose_state_is_lost_says_so(whole: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    facts = {path: json.loads(path.read_text()) for path in sorted((tmp_path / "journal").glob("*.json"))}
    keys = {(f["exchange"], f["client"]): path.stem for path, f in facts.items()}
    home = tmp_path / "clients" / "client_1"
    state = home / f"{(home / (keys['block_0', 'client_1'] + '.state')).read_text()}.safetensors"
    if damage == "gone":
        state.unlink()
    else:
        state.write_bytes(state.read_bytes()[:100])
    (tmp_path / "journal" / f"{keys['block_1', 'client_1']}.json").unlink()
    with pytest.raises(FedfuseError) as caught:
        fedfuse.run(SMALL, out=tmp_path)
    assert "the state of client_1 after an earlier exchange is " in caught.value.what
    assert "delete the run's journal and start again, or leave this client out" in caught.value.what
