"""Flower's own programs as child processes: started with what they need, watched, and never left behind."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from fedfuse.core.errors import ConfigError, FedfuseError

FLOWER_LINE = "1.41"
"""The line of Flower releases whose programs and runtime interface this package was written for."""


def check_flower() -> None:
    """See that Flower is there, in a release that fits.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec("flwr") is None:
        raise ConfigError("Flower is not installed", where="flwr", fix='pip install "fedfuse[flower]"')
    from importlib.metadata import version

    found = version("flwr")
    if not f"{found}.".startswith(f"{FLOWER_LINE}."):
        raise ConfigError(
            f"Flower {found} is installed, a federation is carried by Flower {FLOWER_LINE}",
            where="flwr",
            fix='pip install "fedfuse[flower]"',
        )


def flower_environment(home: Path) -> dict[str, str]:
    """The environment that Flower's programs run in: no telemetry, no look for updates, no installs, own home.

    Args:
        home: where Flower may keep files.
    """
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        "NO_COLOR": "1",
    }


def free_port() -> int:
    """A port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``.

    Args:
        address: an IPv6 host stands in brackets.

    Raises:
        ConfigError: it is something else.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host.strip("[]") or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f'"{address}" is no address', where="HOST:PORT", fix="write it like 0.0.0.0:9092")
    return host.strip("[]"), int(port)


def port_is_taken(host: str, port: int) -> bool:
    """Whether another program listens there.

    Args:
        host: the address to listen on.
        port: its port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


class Child:
    """One program in a process group of its own, which dies with this process however that ends.

    Args:
        program: ``superlink`` or ``supernode``.
        arguments: its command line.
        log: file that its output is appended to.
        environment: all its variables.
        parting_signal: what it gets when this process is killed.
    """

    def __init__(
        self,
        program: str,
        arguments: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str],
        parting_signal: signal.Signals = signal.SIGKILL,
    ) -> None:
        self.program, self.arguments, self.log, self.environment = program, list(arguments), log, dict(environment)
        self.parting_signal = parting_signal
        self._process: subprocess.Popen[bytes] | None = None
        self._began_at_byte = 0
        self.started_s = 0.0

    def start(self) -> None:
        """Start the program.

        Raises:
            FedfuseError: the system gives no process.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        script = Path(__file__).with_name("programs.py")
        lineage = [str(os.getpid()), str(int(self.parting_signal)), self.program]
        # -P: the script's folder must not be where modules are looked for.
        command = [sys.executable, "-P", str(script), *lineage, *self.arguments]
        with self.log.open("ab") as output:
            self._began_at_byte = output.tell()
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self.environment,
                    start_new_session=True,
                )
            except OSError as error:
                raise FedfuseError(
                    f"cannot start Flower's {self.program}: {error.strerror}",
                    where=sys.executable,
                    fix="free memory or processes",
                ) from None
        self.started_s = time.monotonic()

    @property
    def pid(self) -> int | None:
        """Its process id; ``None`` if it was never started."""
        return None if self._process is None else self._process.pid

    def exit_code(self) -> int | None:
        """How it ended; ``None`` while it runs."""
        return None if self._process is None else self._process.poll()

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def output(self, *, max_bytes: int = 20_000) -> str:
        """The last of what it printed since it was started.

        Args:
            max_bytes: how much of it.
        """
        try:
            with self.log.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self._began_at_byte, size - max_bytes))
                return file.read().decode("utf-8", "replace")
        except OSError:
            return ""

    def stop(self, *, patience_s: float = 5.0) -> None:
        """End the program and all that it started: politely, then not.

        Args:
            patience_s: how long it may take to end by itself.
        """
        if self._process is None:
            return
        if self._process.poll() is None:
            self._signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(patience_s)
        # Its group may have outlived it.
        self._signal(signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience_s)

    def kill(self) -> None:
        """End the program and all that it started at once."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _signal(self, number: int) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def answers(address: str, *, timeout_s: float = 5.0) -> bool:
    """Whether somebody listens at an address.

    Args:
        address: ``HOST:PORT``.
        timeout_s: longest wait.
    """
    with suppress(OSError), socket.create_connection(split_address(address), timeout=timeout_s):
        return True
    return False


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let a polite end from outside work like Ctrl-C, so that everything that was started is stopped."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
