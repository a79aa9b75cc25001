"""What a simulation leaves if nobody cleans up: processes of Ray and folders of data; which there are, and their end.

This file also runs as a program, a guard that outlives the one that is killed; it needs nothing but Python.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARK = "FEDFUSE_SIMULATION"
"""Variable of the environment that holds the id of the program that runs the simulation."""

_MAX_SOCKET_FOLDER = 40
"""Ray puts sockets under its folder, whose whole paths may hold no more than about a hundred letters."""

_PATIENCE_S = 2.0
_LONGEST_S = 10.0
_QUIET_LOOKS = 3
_OWN_FILE = re.compile(r"/fedfuse-ray-(\d+)-[^/]+/")


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Have a small process clean up when this one ends, in whatever way.

    Args:
        folder: of clients' data; removed in the end.

    Yields:
        Nothing.
    """
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert guard.stdin is not None
    try:
        yield
    finally:
        guard.stdin.close()
        guard.wait()


def ray_folder() -> Path:
    """Make a folder for one start of Ray; its name tells whose it is, and it is short enough for sockets."""
    return Path(tempfile.mkdtemp(prefix=_ray_name(os.getpid()), dir=_parent()))


def _parent() -> str:
    parent = tempfile.gettempdir()
    return parent if len(parent) <= _MAX_SOCKET_FOLDER else "/tmp"


def _ray_name(program: int) -> str:
    return f"fedfuse-ray-{program}-"


def processes_of(program: int) -> list[int]:
    """Processes of Ray that a program of fedfuse started, by id; none where the system does not tell.

    Args:
        program: its process id.
    """
    return sorted(process_id for process_id, owner in _owners().items() if owner == program)


def end_processes(program: int, *, patience_s: float) -> None:
    """Wait until the processes of a program's simulation are gone, and end those that stay.

    Args:
        program: its process id.
        patience_s: how long to wait.
    """
    deadline = time.monotonic() + patience_s
    while processes_of(program) and time.monotonic() < deadline:
        time.sleep(0.05)
    deadline, num_quiet_looks = time.monotonic() + _LONGEST_S, 0
    # One that is about to end may still start another, so one look that finds nothing is not enough.
    while num_quiet_looks < _QUIET_LOOKS and time.monotonic() < deadline:
        left = processes_of(program)
        num_quiet_looks = 0 if left else num_quiet_looks + 1
        for process_id in left:
            with suppress(OSError):
                os.kill(process_id, signal.SIGKILL)
        time.sleep(0.1)


def _owners() -> dict[int, int]:
    """Process id to the program that it works for, for all other processes of this user."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            owner = _owner(folder)
            if owner is not None and int(folder.name) not in (os.getpid(), owner):
                found[int(folder.name)] = owner
    return found


def _owner(folder: Path) -> int | None:
    name = f"{MARK}=".encode()
    for variable in (folder / "environ").read_bytes().split(b"\0"):
        if variable.startswith(name) and variable[len(name) :].isdigit():
            return int(variable[len(name) :])
    # Ray's processes write their titles over the environment that they were started with; their logs stay open.
    for descriptor in (folder / "fd").iterdir():
        with suppress(OSError):
            if match := _OWN_FILE.search(os.readlink(descriptor)):
                return int(match[1])
    return None


def main() -> None:
    """Wait until the program closes the pipe, by intent or by its end; then clean up after it."""
    program, folder = int(sys.argv[1]), Path(sys.argv[2])
    sys.stdin.buffer.read()
    end_processes(program, patience_s=_PATIENCE_S)
    for each in (folder, *Path(_parent()).glob(f"{_ray_name(program)}*")):
        shutil.rmtree(each, ignore_errors=True)


if __name__ == "__main__":
    main()
