"""Faults of one machine: kill -9 anywhere, a full disk, a jumping clock, a client that hangs, damaged files."""

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

from federation import (
    CLIENTS,
    FEDAVG,
    FUSEFL,
    NUM_CLIENTS,
    NUM_EXCHANGES,
    asked_again,
    changed,
    descendants,
    digest,
    is_running,
    kept,
    replies,
    run,
    start,
    undisturbed,
    wait_until,
    write,
)
from outcome import ALL_THERE, SAME, Seen, Skipped, check, fault, said

FAMILY = "one machine"


@fault(FAMILY, "kill -9 of the server at every exchange")
def killed_at_every_exchange(home: Path) -> Seen:
    """One run that is killed once in each of its exchanges, and continued each time by the same command."""
    wanted = undisturbed(FUSEFL, home)
    config, folder = write(home / "c.yaml", FUSEFL), home / "run"
    moments = random.Random(3)
    for exchange in range(NUM_EXCHANGES):
        before = replies(folder)
        process = start("run", config, "--out", folder)
        needed = exchange * NUM_CLIENTS + 2
        check(wait_until(lambda needed=needed: len(replies(folder)) >= needed), f"no {needed} replies")
        time.sleep(moments.uniform(0, 0.05))
        workers = descendants(process.pid)
        process.kill()
        process.finish()
        check(wait_until(lambda workers=workers: not any(map(is_running, workers)), limit_s=10), "workers live on")
        check(not (folder / "result.json").exists(), "the run had ended before it was killed")
        kept(before, folder)
    before = replies(folder)
    code, text = run("run", config, "--out", folder)
    check(code == 0, text)
    kept(before, folder)
    check(digest(folder) == wanted, "another digest")
    total = NUM_CLIENTS * NUM_EXCHANGES
    check(len(asked_again(folder)) == total - len(before), "something was asked twice")
    return Seen(
        f"killed {NUM_EXCHANGES} times, once in every exchange; {len(before)} of {total} answers were journaled and "
        "were not asked for again; no worker outlived its server",
        SAME,
    )


_KILLED_WRITING = """
import os, signal, sys
count, last = 0, int(sys.argv[1])
def dying(original):
    def call(*args, **kwargs):
        global count
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    return call
import fedfuse, fedfuse.core.files as files
class Os:
    replace, fsync = staticmethod(dying(os.replace)), staticmethod(dying(os.fsync))
    def __getattr__(self, name):
        return getattr(os, name)
files.os = Os()
import sklearn.datasets, torch, torch._dynamo, yaml
torch.set_num_threads(1)
config = yaml.safe_load(open(sys.argv[2]))
for folder in sys.argv[3:]:
    count = 0
    pid = os.fork()
    if pid == 0:
        try:
            fedfuse.run(config, out=folder)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(2)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    last += 1
"""


@fault(FAMILY, "kill -9 at every single step of writing")
def killed_while_writing(home: Path) -> Seen:
    """Kill a small run before every sync and before every rename of every file that it writes, one after another."""
    config = changed(
        FUSEFL,
        {
            "data.limit": 40,
            "data.test_limit": 20,
            "data.partition": {"scheme": "iid", "num_clients": 1},
            "data.validation_fraction": 0.2,
            "model": {"family": "mlp", "width": 4, "depth": 2},
            "method.num_blocks": 2,
            "method.local.num_epochs": 2,
            "runtime.workers": 1,
            "federation": {},
        },
    )
    wanted = undisturbed(config, home)
    path = write(home / "c.yaml", config)
    script = home / "killed.py"
    script.write_text(_KILLED_WRITING, encoding="utf-8")
    never = 10**9

    def tried(first: int, folders: list[Path]) -> list[int]:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(script), str(first), str(path), *map(str, folders)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=1800)
        codes = [int(code) for code in done.stdout.split()]
        check(len(codes) == len(folders), done.stderr[-500:])
        check(set(codes) <= {0, -signal.SIGKILL}, f"exit codes {codes}: {done.stderr[-500:]}")
        return codes

    first, killed, more = 1, [], True
    while more:
        folders = [home / "killed" / str(number) for number in range(first, first + 20)]
        codes = tried(first, folders)
        killed += [folder for folder, code in zip(folders, codes, strict=True) if code == -signal.SIGKILL]
        more, first = 0 not in codes, first + 20
    check(len(killed) > 30, f"only {len(killed)} steps")
    before = {folder: replies(folder) for folder in killed}
    for at in range(0, len(killed), 20):
        codes = tried(never, killed[at : at + 20])
        check(set(codes) == {0}, f"exit codes {codes}")
    for folder in killed:
        kept(before[folder], folder)
        check(digest(folder) == wanted, f"another digest after the kill at step {folder.name}")
        again = len(asked_again(folder))
        check(again == len(replies(folder)) - len(before[folder]), f"step {folder.name}: something was asked twice")
        half = [p.name for p in (folder / "artifact").glob("*") if p.name.endswith(".part")]
        check(not half, f"an unfinished file in the artifact: {half}")
    return Seen(f"{len(killed)} runs, each killed at the next step of writing, were continued", SAME)


def tmpfs(home: Path, size_kib: int) -> Path:
    """A file system of that size; where the machine does not let it be made, the trial is left out.

    Args:
        home: folder for the mount point.
        size_kib: its size.
    """
    place = home / "small"
    place.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Skipped(f"no right to mount a tmpfs here: {done.stderr.strip()}")
    return place


@fault(FAMILY, "disk full")
def disk_full(home: Path) -> Seen:
    """A run on a file system that fills up, which is then enlarged step by step."""
    wanted = undisturbed(FUSEFL, home)
    config = write(home / "c.yaml", FUSEFL)
    place = tmpfs(home, 40)
    folder, message, times = place / "run", "", 0
    try:
        size_kib = 40
        while True:
            before = replies(folder)
            code, text = run("run", config, "--out", folder)
            kept(before, folder)
            if code == 0:
                break
            check(code == 2, text[-500:])
            message = said(text, "cannot write: No space left on device", "then run the same command again")
            times += 1
            size_kib += size_kib // 2
            check(times < 20, "it never ends")
            subprocess.run(["mount", "-o", f"remount,size={size_kib}k", str(place)], check=True)
        check(times >= 2, f"the disk was full only {times} times")
        check(digest(folder) == wanted, "another digest")
    finally:
        subprocess.run(["umount", str(place)], check=True)
    message = message.replace(str(home), "...")
    return Seen(
        f"the disk was full {times} times, at other files each time; each time the command ended", SAME, message
    )


_JUMPING = """
import random, time
_true, _random = time.time, random.Random(5)
_jump = [0.0]
def _time():
    if _random.random() < 0.05:
        _jump[0] = _random.choice([-1, 1]) * _random.uniform(0, 3e7)
    return _true() + _jump[0]
time.time = _time
time.time_ns = lambda: int(_time() * 1e9)
"""


@fault(FAMILY, "clock jumps")
def clock_jumps(home: Path) -> Seen:
    """The wall clock jumps by up to a year, back and forth, while the run is killed and continued."""
    config = changed(FUSEFL, {"federation.timeout_s": 60})
    wanted = undisturbed(config, home)
    path, folder = write(home / "c.yaml", config), home / "run"
    (home / "clock").mkdir()
    (home / "clock" / "sitecustomize.py").write_text(_JUMPING, encoding="utf-8")
    env = {"PYTHONPATH": str(home / "clock")}
    process = start("run", path, "--out", folder, env=env)
    check(wait_until(lambda: len(replies(folder)) >= 7), "no 7 replies")
    process.kill()
    process.finish()
    for file in (folder / "journal").iterdir():
        os.utime(file, (4e9, 4e9))
    before = replies(folder)
    code, text = run("run", path, "--out", folder, env=env)
    check(code == 0, text)
    kept(before, folder)
    check(digest(folder) == wanted, "another digest")
    return Seen("jumps of up to a year in either direction, with a limit of 60 s per client: nobody was missing", SAME)


@fault(FAMILY, "kill -9 of a client")
def client_killed(home: Path) -> Seen:
    """A worker process is killed while its client trains."""
    wanted = undisturbed(FUSEFL, home)
    path, folder = write(home / "c.yaml", FUSEFL), home / "run"
    process = start("run", path, "--out", folder)
    check(wait_until(lambda: len(replies(folder)) >= NUM_CLIENTS + 1), "no replies")
    workers = descendants(process.pid)
    check(workers, "no workers")
    os.kill(min(workers), signal.SIGKILL)
    code, text = process.finish()
    check(code == 2, f"exit code {code}: {text[-400:]}")
    message = said(text, "its worker process died (exit code -9)").replace(str(home), "...")
    before = replies(folder)
    code, text = run("run", path, "--out", folder)
    check(code == 0, text)
    kept(before, folder)
    check(digest(folder) == wanted, "another digest")
    return Seen("missing, with the reason; the same command asked only that one again", ALL_THERE, message)


@fault(FAMILY, "a client that hangs")
def hangs(home: Path) -> Seen:
    """A worker process is stopped for ever while its client trains."""
    config = changed(FUSEFL, {"federation.timeout_s": 6, "method.local.num_epochs": 60})
    wanted = undisturbed(changed(config, {"federation.timeout_s": 300}), home)
    path, folder = write(home / "c.yaml", config), home / "run"
    process = start("run", path, "--out", folder)
    check(wait_until(lambda: len(descendants(process.pid)) == 2), "no workers")
    time.sleep(0.1)
    os.kill(min(descendants(process.pid)), signal.SIGSTOP)
    code, text = process.finish()
    check(code == 2, text)
    message = said(text, f"{NUM_CLIENTS - 1} of {NUM_CLIENTS} clients answered", "no reply within 6 s")
    before = replies(folder)
    check(len(before) == NUM_CLIENTS - 1, f"{len(before)} answers")
    write(path, changed(config, {"federation.timeout_s": 300}))
    code, text = run("run", path, "--out", folder)
    check(code == 0, text)
    kept(before, folder)
    check(digest(folder) == wanted, "another digest")
    message = message.replace(str(home), "...")
    return Seen("missing after its limit of time, the others' answers are kept", ALL_THERE, message)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 0x40
    path.write_bytes(bytes(data))


def _garbage(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(1000))


def _huge(path: Path) -> None:
    with path.open("r+b") as file:
        file.write((9_999_999_000).to_bytes(8, "little"))
        file.truncate(10_000_000_000)


def _remove(path: Path) -> None:
    path.unlink()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut": _cut,
    "emptied": _empty,
    "one bit": _flip,
    "garbage": _garbage,
    "10 GB": _huge,
    "removed": _remove,
}


@fault(FAMILY, "damaged files of the journal")
def damaged_journal(home: Path) -> Seen:
    """Every kind of damage to both files of an answer, and to a swap of two clients' answers."""
    wanted = undisturbed(FEDAVG, home)
    path, whole = write(home / "c.yaml", FEDAVG), home / "whole"
    check(run("run", path, "--out", whole)[0] == 0, "no run")
    cases: list[tuple[str, Callable[[Path], Any]]] = [
        (f"{name} {suffix}", lambda journal, damage=damage, suffix=suffix: damage(next(journal.glob(f"*{suffix}"))))
        for name, damage in DAMAGES.items()
        for suffix in (".safetensors", ".json")
    ]

    def swap(journal: Path) -> None:
        first, second = sorted(journal.glob("*.safetensors"))[:2]
        data = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(data)

    cases.append(("two answers swapped", swap))
    message = ""
    for name, damage in cases:
        folder = home / "damaged"
        shutil.copytree(whole, folder)
        (folder / "result.json").unlink()
        damage(folder / "journal")
        code, text = run("run", path, "--out", folder)
        check(code == 0, f"{name}: {text[-500:]}")
        check(digest(folder) == wanted, f"{name}: another digest")
        again = asked_again(folder)
        check(len(again) == (2 if name.startswith("two") else 1), f"{name}: asked again {again}")
        if "was damaged" in text:
            message = next(line.strip() for line in text.splitlines() if "was damaged" in line)
        shutil.rmtree(folder)
    check(message, "nobody was told")
    return Seen(f"{len(cases)} damages: only what was damaged was asked for again", SAME, message)


@fault(FAMILY, "damaged state of a client")
def damaged_state(home: Path) -> Seen:
    """A client's state between two exchanges is damaged while the server is down."""
    wanted = undisturbed(FUSEFL, home)
    path, folder = write(home / "c.yaml", FUSEFL), home / "run"
    process = start("run", path, "--out", folder)
    check(wait_until(lambda: len(replies(folder)) >= NUM_CLIENTS + 1), "no replies")
    process.kill()
    process.finish()
    for state in (folder / "clients" / CLIENTS[0]).glob("*.safetensors"):
        _flip(state)
    code, text = run("run", path, "--out", folder)
    check(code == 2, f"exit code {code}: {text[-400:]}")
    message = said(text, "the state of client_0 after an earlier exchange is gone or damaged").replace(str(home), "...")
    shutil.rmtree(folder / "journal")
    code, text = run("run", path, "--out", folder)
    check(code == 0, text)
    check(digest(folder) == wanted, "another digest")
    return Seen("the client is missing and says why; what the message advises was done", SAME, message)


@fault(FAMILY, "the same command twice at once")
def twice_at_once(home: Path) -> Seen:
    """A second server on a run's folder while the first is at work."""
    wanted = undisturbed(FUSEFL, home)
    path, folder = write(home / "c.yaml", FUSEFL), home / "run"
    process = start("run", path, "--out", folder)
    check(wait_until(lambda: replies(folder)), "no replies")
    code, text = run("run", path, "--out", folder)
    check(code == 2, text)
    message = said(text, "another fedfuse process is using this folder").replace(str(home), "...")
    code, text = process.finish()
    check(code == 0, text)
    check(digest(folder) == wanted, "another digest")
    facts = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    check(not facts["missing"], "somebody is missing")
    return Seen("the second ended at once and changed nothing", SAME, message)
