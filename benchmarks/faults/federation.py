"""The small federation that faults are tried on, its undisturbed digest, and processes to kill."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import yaml
from outcome import check

NUM_CLIENTS = 5
CLIENTS = [f"client_{number}" for number in range(NUM_CLIENTS)]
FUSEFL: dict[str, Any] = {
    "seed": 4,
    "data": {
        "source": "digits",
        "limit": 400,
        "test_limit": 100,
        "partition": {"scheme": "dirichlet", "num_clients": NUM_CLIENTS, "dirichlet_alpha": 0.5},
    },
    "model": {"family": "cnn", "width": 8, "depth": 4},
    "method": {"name": "fusefl", "num_blocks": 4, "local": {"num_epochs": 6, "batch_size": 32}},
    "runtime": {"name": "local", "workers": 2},
    "server": {"threads": 1},
    "federation": {"timeout_s": 300},
}
FEDAVG: dict[str, Any] = {
    **FUSEFL,
    "model": {"family": "mlp", "width": 32, "depth": 2},
    "method": {"name": "fedavg", "local": {"num_epochs": 2, "batch_size": 32}},
    "runtime": {"name": "local", "workers": 1},
    "federation": {},
}
NUM_EXCHANGES = 5
"""Of FuseFL with four blocks: the blocks and the moments."""

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "COLUMNS": "200",
    "NO_COLOR": "1",
    "TERM": "dumb",
}
_UNDISTURBED: dict[str, str] = {}
_IMPORTED: list[Any] = []


def write(path: Path, config: Mapping[str, Any]) -> Path:
    """Write a configuration.

    Args:
        path: where.
        config: what.

    Returns:
        The path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
    return path


class Command:
    """A fedfuse command in a process group of its own, and what it prints.

    The process is forked from this one, which has imported everything once: it runs the same code as the command that a
    shell starts, and begins ten seconds earlier on a busy machine.

    Args:
        arguments: after ``fedfuse``.
        env: variables beside the usual ones; with some, a fresh interpreter is started.
        cwd: where it runs.
    """

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the command is looked at
        self._code: int | None = None
        if env:
            process = subprocess.Popen(
                [sys.executable, "-m", "fedfuse.cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                env={**ENVIRONMENT, **env},
                cwd=cwd,
                start_new_session=True,
            )
            self.pid, process.returncode = process.pid, 0  # waited for here, not there
            return
        warm()
        self.pid = os.fork()
        if self.pid == 0:
            self._become(arguments, cwd)

    def _become(self, arguments: Sequence[str], cwd: Path | None) -> NoReturn:
        code = 1
        try:
            os.setsid()
            for number, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, self._output.fileno())):
                os.dup2(file, number)
            os.dup2(1, 2)
            os.environ.update(ENVIRONMENT)
            if cwd is not None:
                os.chdir(cwd)
            sys.argv = ["fedfuse", *arguments]
            sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
            from fedfuse.cli import main

            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        """The exit code, or nothing while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def kill(self, *, group: bool = False) -> None:
        """End it as a power cut does.

        Args:
            group: and all that it started.
        """
        if group:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        elif self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def text(self) -> str:
        """What it has printed so far."""
        self._output.seek(0)
        return self._output.read()

    def finish(self, timeout_s: float = 300.0) -> tuple[int, str]:
        """Wait for its end.

        Args:
            timeout_s: it is killed after that.

        Returns:
            Its exit code and what it printed.
        """
        if not wait_until(lambda: self.poll() is not None, limit_s=timeout_s):
            self.kill(group=True)
            raise AssertionError(f"no end after {timeout_s:g} s: {self.text()[-500:]}")
        return self.poll() or 0, self.text()


def warm() -> None:
    """Import, once, all that a command will import."""
    if _IMPORTED:
        return
    os.environ.update(ENVIRONMENT)
    import torch

    torch.set_num_threads(1)
    import matplotlib

    matplotlib.use("Agg")
    modules = (
        *("fedfuse.cli", "fedfuse.commands.live", "fedfuse.experiment", "fedfuse.methods", "fedfuse.report"),
        *("jinja2", "matplotlib.backends.backend_agg", "matplotlib.figure", "sklearn.datasets", "torch._dynamo"),
    )
    _IMPORTED.extend(importlib.import_module(module) for module in modules)


def start(*arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Command:
    """Start a fedfuse command.

    Args:
        arguments: after ``fedfuse``.
        env: variables beside the usual ones.
        cwd: where it runs.
    """
    return Command([str(argument) for argument in arguments], env, cwd)


def run(*arguments: str | Path, env: Mapping[str, str] | None = None, timeout_s: float = 300.0) -> tuple[int, str]:
    """Run a fedfuse command to its end.

    Args:
        arguments: after ``fedfuse``.
        env: variables beside the usual ones.
        timeout_s: it is killed after that.

    Returns:
        Its exit code and what it printed.
    """
    return start(*arguments, env=env).finish(timeout_s)


@contextmanager
def gone_at_the_end(processes: list[Command]) -> Iterator[None]:
    """Leave no process behind, whatever happens.

    Args:
        processes: commands; more may be added meanwhile.

    Yields:
        Nothing.
    """
    try:
        yield
    finally:
        for process in processes:
            process.kill(group=True)
            wait_until(lambda process=process: process.poll() is not None, limit_s=10)


def digest(folder: Path) -> str:
    """The artifact's digest of a run that ended.

    Args:
        folder: the run's.
    """
    return str(json.loads((folder / "result.json").read_text(encoding="utf-8"))["artifact"]["digest"])


def undisturbed(config: Mapping[str, Any], home: Path) -> str:
    """The digest of a run that nothing happened to, on the local runtime.

    Args:
        config: of the run.
        home: a folder to run it in, the first time.
    """
    key = json.dumps(config, sort_keys=True)
    if key not in _UNDISTURBED:
        folder = home / "undisturbed"
        code, text = run("run", write(folder / "c.yaml", config), "--out", folder / "run")
        check(code == 0, f"the undisturbed run failed: {text[-500:]}")
        _UNDISTURBED[key] = digest(folder / "run")
    return _UNDISTURBED[key]


def replies(folder: Path) -> set[str]:
    """Names of the whole entries in a run's journal.

    Args:
        folder: the run's.
    """
    return {path.name for path in (folder / "journal").glob("*.json")}


def asked_again(folder: Path) -> list[tuple[str, str]]:
    """Exchange and client of every answer that did not come from the journal.

    Args:
        folder: of a run that ended.
    """
    entries = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))["entries"]
    return [(entry["exchange"], entry["client"]) for entry in entries if not entry["from_journal"]]


def wait_until(condition: Callable[[], object], *, limit_s: float = 300.0, every_s: float = 0.01) -> bool:
    """Wait for something.

    Args:
        condition: true once it is so.
        limit_s: give up after that.
        every_s: how often to look.

    Returns:
        Whether it came.
    """
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(every_s)
    return bool(condition())


def descendants(pid: int) -> set[int]:
    """All processes that a process started, and theirs.

    Args:
        pid: of the process.
    """
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        for thread in Path(f"/proc/{waiting.pop()}/task").glob("*"):
            with suppress(OSError):
                children = {int(child) for child in (thread / "children").read_text().split()}
                waiting += sorted(children - found)
                found |= children
    return found


def is_running(pid: int) -> bool:
    """Whether a process is alive.

    Args:
        pid: of the process.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except OSError:
        return False


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with some settings changed.

    Args:
        config: the configuration.
        changes: dotted name to value.
    """
    result: dict[str, Any] = json.loads(json.dumps(config))
    for name, value in changes.items():
        *path, last = name.split(".")
        table = result
        for key in path:
            table = table.setdefault(key, {})
        table[last] = value
    return result


def kept(before: Sequence[str] | set[str], folder: Path) -> None:
    """Demand that nothing that was accepted is lost.

    Args:
        before: names of entries that were there.
        folder: the run's.
    """
    lost = set(before) - replies(folder)
    check(not lost, f"{len(lost)} accepted replies are lost")
