"""The trials of faults can be listed, their mutations reach every decoder, and the bad network is bad."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parents[1] / "benchmarks" / "faults"

# Of typer's import of click, where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:'click:DeprecationWarning")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(HOME))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        # Their names are too common to be left where other tests may import them.
        if str(HOME) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_the_trials_have_names_and_families() -> None:
    done = subprocess.run(
        [sys.executable, str(HOME / "run.py"), "--list"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(set(lines)) >= 40
    for part in ("kill -9", "disk full", "clock", "hangs", "twice", "another client's name", "10 GB", "200", "1,000"):
        assert any(part in line for line in lines), part


def test_mutated_bytes_end_in_a_result_or_in_an_error_of_ours(tmp_path: Path) -> None:
    from fuzz import Decoders, flower_decoders
    from mutations import Mutator, valid

    decoders, mutator = Decoders(tmp_path), Mutator(1)
    decoders.more = flower_decoders()
    for data in valid():
        decoders(data)
    assert decoders.accepted == len(valid())
    for _ in range(300):
        decoders(mutator.fresh())
    assert decoders.accepted > len(valid()) + 10


def test_a_disagreement_of_two_decoders_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fuzz import Decoders, Finding
    from mutations import valid

    decoders = Decoders(tmp_path)
    monkeypatch.setattr(decoders, "_decoded", lambda data: {"another": 1})
    with pytest.raises(Finding, match="file and bytes hold different values"):
        decoders(valid()[1])


@pytest.fixture
def echo() -> Iterator[int]:
    """Port of a server that sends back what it gets."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                while data := connection.recv(4096):
                    connection.sendall(data)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


def through(port: int, num_bytes: int) -> int:
    """How many bytes come back."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        try:
            connection.sendall(b"x" * num_bytes)
            connection.shutdown(socket.SHUT_WR)
            found = 0
            while data := connection.recv(4096):
                found += len(data)
        except OSError:
            return -1
        return found


def test_the_bad_network_carries_delays_cuts_and_goes_dark(echo: int) -> None:
    from proxy import BadNetwork

    good = BadNetwork(echo, delay_s=0.01)
    assert through(good.port, 1000) in (1000, 0)
    good.is_dark = True
    assert through(good.port, 10) in (0, -1)
    good.close()
    cutting = BadNetwork(echo, cut_every_bytes=100, seed=1)
    assert through(cutting.port, 100_000) < 1000
    assert cutting.num_cuts == 1
    cutting.close()
