"""Flower's programs as children: nothing is left behind, and what is not for clients is for this machine only."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from importlib import metadata, util
from pathlib import Path
from typing import Any

import pytest

from fedfuse.core.errors import ConfigError, FedfuseError
from fedfuse.runtimes.flower import programs
from fedfuse.runtimes.flower.processes import (
    Child,
    answers,
    check_flower,
    flower_environment,
    free_port,
    port_is_taken,
    sigterm_interrupts,
    split_address,
)
from fedfuse.runtimes.flower.programs import OwnMachineOnly

SLEEPER = "import signal, sys, time; print('here', flush=True); time.sleep(60)"


@pytest.fixture
def sleeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Child:
    """A child that runs a small script instead of Flower's programs."""
    monkeypatch.setattr(sys, "executable", str(script(tmp_path)))
    return Child("superlink", ["--flag"], log=tmp_path / "logs" / "log", environment=dict(os.environ))


def script(folder: Path) -> Path:
    """Stands for Python: is started with the same command line and sleeps."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\necho "$@"\nsleep 60 &\nexec {sys.executable} -c "{SLEEPER}"\n')
    path.chmod(0o755)
    return path


def wait_for(child: Child, text: str) -> None:
    deadline = time.monotonic() + 20
    while text not in child.output() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert text in child.output()


def members(group: int) -> list[int]:
    """Processes of a group that are not zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def test_a_child_and_what_it_started_end_together(sleeper: Child) -> None:
    assert (sleeper.pid, sleeper.is_running, sleeper.exit_code(), sleeper.output()) == (None, False, None, "")
    sleeper.stop()
    sleeper.start()
    wait_for(sleeper, "here")
    assert sleeper.is_running
    assert f"{os.getpid()} {int(signal.SIGKILL)} superlink --flag" in sleeper.output()
    assert sleeper.pid is not None
    assert len(members(sleeper.pid)) == 2
    sleeper.stop()
    assert not sleeper.is_running
    assert sleeper.exit_code() == -signal.SIGTERM
    assert members(sleeper.pid) == []


def test_only_the_output_of_the_last_start_is_shown(sleeper: Child) -> None:
    for _ in range(2):
        sleeper.start()
        wait_for(sleeper, "here")
        sleeper.kill()
    assert sleeper.output().count("here") == 1
    assert sleeper.log.read_text().count("here") == 2
    assert sleeper.exit_code() == -signal.SIGKILL


def test_a_child_dies_with_a_parent_that_is_killed() -> None:
    program = (
        "import os, runpy, time\n"
        f"die_with_parent = runpy.run_path({programs.__file__!r})['die_with_parent']\n"
        "parent = os.getpid()\n"
        "child = os.fork()\n"
        "if not child:\n"
        f"    die_with_parent(parent, {int(signal.SIGKILL)})\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert Path(f"/proc/{child}").exists()
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 10
    while _is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _is_alive(child)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_program_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(FedfuseError) as caught:
        Child("supernode", [], log=tmp_path / "log", environment={}).start()
    assert caught.value.what == "cannot start Flower's supernode: No such file or directory"


def test_sigterm_is_like_ctrl_c() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def be_ended() -> None:
        with sigterm_interrupts():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        be_ended()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("address", "parts"), [("0.0.0.0:9092", ("0.0.0.0", 9092)), ("[::]:1", ("::", 1)), ("fed.org:80", ("fed.org", 80))]
)
def test_addresses(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


def test_ports() -> None:
    port = free_port()
    assert not port_is_taken("127.0.0.1", port)
    assert not answers(f"127.0.0.1:{port}")
    with socket.create_server(("127.0.0.1", port)):
        assert port_is_taken("127.0.0.1", port)
        assert answers(f"127.0.0.1:{port}")


def test_flower_is_kept_quiet(tmp_path: Path) -> None:
    environment = flower_environment(tmp_path)
    assert environment["FLWR_HOME"] == str(tmp_path)
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"


def test_without_flower_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        check_flower()
    assert str(caught.value) == 'Flower is not installed\n  where: flwr\n  fix:   pip install "fedfuse[flower]"'


@pytest.mark.parametrize(("version", "fits"), [("1.41.0", True), ("1.41", True), ("1.4.1", False), ("1.42.0", False)])
def test_another_line_of_flower_is_named(monkeypatch: pytest.MonkeyPatch, version: str, fits: bool) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: object())
    monkeypatch.setattr(metadata, "version", lambda name: version)
    if fits:
        check_flower()
        return
    with pytest.raises(ConfigError) as caught:
        check_flower()
    assert caught.value.what == f"Flower {version} is installed, a federation is carried by Flower 1.41"


def status_of(path: str, client: tuple[str, int] | None, server: tuple[str, int] | None = ("10.0.0.5", 9092)) -> int:
    """What the guard lets through is answered with 200."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "client": client, "server": server}
    asyncio.run(OwnMachineOnly(app)(scope, None, send))  # type: ignore[arg-type]
    return int(sent[0]["status"])


@pytest.mark.parametrize("path", ["/v1/fleet/pull-messages", "/health"])
def test_nodes_reach_what_is_for_them(path: str) -> None:
    assert status_of(path, ("198.51.100.9", 50000)) == 200


@pytest.mark.parametrize("path", ["/v1/control/stop-run", "/v1/runtime/acquire-task", "/docs", "/openapi.json", "/"])
def test_nobody_outside_reaches_anything_else(path: str) -> None:
    assert status_of(path, ("198.51.100.9", 50000)) == 404
    assert status_of(path, None) == 404
    assert status_of(path, ("no address", 1)) == 404
    assert status_of(path, ("198.51.100.9", 1), None) == 404
    for own in ("127.0.0.1", "::1", "::ffff:127.0.0.1", "10.0.0.5"):
        assert status_of(path, (own, 50000)) == 200
