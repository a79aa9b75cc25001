"""Flower's simulation engine on Ray, started and ended from a program: quiet, and leaving nothing behind."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import ray
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedfuse.core.errors import ConfigError, FedfuseError
from fedfuse.runtimes.flower.leftovers import MARK, end_processes, ray_folder

_START_LIMIT_S = 60.0
_END_LIMIT_S = 60.0
_PATIENCE_S = 1.0
_PARTING_WORDS = b"Failed to push error to driver"

RESTARTS = {"max_restarts": -1, "max_task_retries": 1}
"""Options of Ray's actors: a process that dies is replaced, and what it was doing is asked for once more."""


class SimulationLost(FedfuseError):
    """Flower's simulation engine ended by itself; the same command continues from the journal."""


class Engine:
    """A running simulation.

    Args:
        app: what virtual nodes do.
        cpus: cores to use on this machine; ``None`` where ``address`` names a cluster.
        cpus_per_client: cores that one client needs.
        gpus_per_client: GPUs, or a share of one, that one client needs.
        address: of a Ray cluster; ``None`` starts Ray on this machine.
        num_clients: how many there are; no more virtual nodes are made.

    Raises:
        ConfigError: Ray cannot be reached, or no client fits into what it has.
        SimulationLost: the engine does not start.
    """

    def __init__(
        self,
        app: ClientApp,
        *,
        cpus: int | None,
        cpus_per_client: float,
        gpus_per_client: float,
        address: str | None,
        num_clients: int,
    ) -> None:
        self._stack = ExitStack()
        self._stop, self._is_ready = threading.Event(), threading.Event()
        self._grid: Grid | None = None
        self._error: BaseException | None = None
        self._words: deque[str] = deque(maxlen=20)
        try:
            self._start_ray(cpus, address)
            self.num_workers = num_that_fit(cpus_per_client, gpus_per_client)
            # A node takes at most one message per look of Flower's, every tenth of a second.
            self.num_nodes = min(num_clients, max(64, 4 * self.num_workers))
            resources = {"num_cpus": cpus_per_client, "num_gpus": gpus_per_client, **RESTARTS}
            self._thread = threading.Thread(target=self._run, args=(app, resources), daemon=True)
            self._thread.start()
            self._stack.callback(self._end)
            self._wait_for_nodes()
        except BaseException:
            self.close()
            raise

    @property
    def grid(self) -> Grid:
        """Carries messages to virtual nodes.

        Raises:
            SimulationLost: the engine has ended.
        """
        if self._grid is None or not self._thread.is_alive():
            raise self.lost()
        return self._grid

    def close(self) -> None:
        """End the engine and every process that it started on this machine."""
        self._stack.close()

    def _start_ray(self, cpus: int | None, address: str | None) -> None:
        if ray.is_initialized():
            raise ConfigError(
                "Ray is already running in this program", where="runtime", fix="call ray.shutdown() before the run"
            )
        self._stack.enter_context(_quiet(self._words))
        paths = os.pathsep.join(path for path in sys.path if path)
        options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
        if address is None:
            # Ray's processes inherit this; an environment of their own would cost each of them a second.
            self._stack.enter_context(_environment({"PYTHONPATH": paths, MARK: str(os.getpid())}))
            self._stack.callback(end_processes, os.getpid(), patience_s=_PATIENCE_S)
            folder = ray_folder()
            self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
            options |= {"num_cpus": cpus, "_temp_dir": str(folder)}
        else:
            check_reachable(address)
            self._stack.enter_context(_environment({}))
            options |= {"address": address, "runtime_env": {"env_vars": {"PYTHONPATH": paths}}}
        try:
            with _rays_own_leaks():
                ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"Ray cannot be started: {first}" if address is None else f"the Ray cluster cannot be reached: {first}",
                where="runtime" if address is None else "runtime.address",
                fix="see that this machine has memory and disk space left"
                if address is None
                else "run ray status on one of its machines",
            ) from None
        self._stack.callback(_end_ray)

    def _run(self, app: ClientApp, resources: Mapping[str, float]) -> None:
        server = ServerApp()

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            self._grid = grid
            self._is_ready.set()
            self._stop.wait()

        try:
            run_simulation(server, app, self.num_nodes, backend_config={"client_resources": dict(resources)})
        except BaseException as error:  # told to whoever waits for the grid; a thread has nobody else
            self._error = error
        finally:
            self._is_ready.set()

    def _wait_for_nodes(self) -> None:
        self._is_ready.wait(_START_LIMIT_S)
        deadline = time.monotonic() + _START_LIMIT_S
        while len(list(self.grid.get_node_ids())) < self.num_nodes:
            if time.monotonic() > deadline:
                raise self.lost()
            time.sleep(0.01)

    def _end(self) -> None:
        self._stop.set()
        with _rays_own_leaks(), _without_parting_words():
            self._thread.join(_END_LIMIT_S)

    def lost(self) -> SimulationLost:
        """What to say when the engine has ended by itself."""
        words = f": {self._error}" if self._error else ""
        last = "\n".join(self._words).strip()[-1500:]
        return SimulationLost(
            f"Flower's simulation engine ended{words}" + (f"\n{last}" if last else ""),
            where="runtime",
            fix="run the same command again: what was received is in the journal",
        )


def check_reachable(address: str) -> None:
    """Refuse the address of a cluster that nobody listens at: Ray itself would try for minutes.

    Args:
        address: ``HOST:PORT``; anything else, such as ``auto``, is left to Ray.

    Raises:
        ConfigError: no connection within five seconds.
    """
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"the Ray cluster cannot be reached: {error}",
            where="runtime.address",
            fix="run ray status on one of its machines",
        ) from None


def _end_ray() -> None:
    with _rays_own_leaks():
        ray.shutdown()


@contextmanager
def _rays_own_leaks() -> Iterator[None]:
    """Ray leaves files and processes that have ended to the collector of garbage, which complains of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


@contextmanager
def _without_parting_words() -> Iterator[None]:
    """Take out what Ray's C++ core writes to the standard error when it ends; whatever else is written comes after."""
    sys.stderr.flush()
    try:
        stderr = os.dup(2)
    except OSError:
        yield
        return
    with os.fdopen(stderr, "wb", buffering=0) as original, tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(original.fileno(), 2)
            kept.seek(0)
            for line in kept:
                if _PARTING_WORDS not in line:
                    original.write(line)


def num_that_fit(cpus_per_client: float, gpus_per_client: float) -> int:
    """How many clients compute at once in the Ray that runs, machine by machine.

    Args:
        cpus_per_client: cores that one client needs.
        gpus_per_client: GPUs, or a share of one, that one client needs.

    Raises:
        ConfigError: none does.
    """
    found, cpus, gpus = 0, 0.0, 0.0
    for machine in ray.nodes():  # type: ignore[no-untyped-call]
        has = machine["Resources"] if machine["Alive"] else {}
        cpus, gpus = cpus + has.get("CPU", 0.0), gpus + has.get("GPU", 0.0)
        fits = int(has.get("CPU", 0.0) / cpus_per_client)
        found += min(fits, int(has.get("GPU", 0.0) / gpus_per_client)) if gpus_per_client else fits
    if found:
        return found
    raise ConfigError(
        f"no client fits: one needs {cpus_per_client:g} CPUs and {gpus_per_client:g} GPUs, "
        f"Ray has {cpus:g} and {gpus:g}",
        where="runtime",
        fix="lower runtime.cpus_per_client or runtime.gpus_per_client",
    )


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment for a while; Flower and Ray change some too."""
    names = ("PYTHONPATH", *values)
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Keep(logging.Handler):
    def __init__(self, words: deque[str]) -> None:
        super().__init__(logging.WARNING)
        self._words = words

    def emit(self, record: logging.LogRecord) -> None:
        self._words.append(record.getMessage())


@contextmanager
def _quiet(words: deque[str]) -> Iterator[None]:
    """Keep what Flower and Ray say instead of printing it; a failing client is told in the run's own words."""
    from ray._private import worker

    logger = logging.getLogger("flwr")
    handlers, propagates = list(logger.handlers), logger.propagate
    # Messages of Ray's machine process are printed by a thread that no setting stops.
    printing = getattr(worker, "print_to_stdstream", None)
    if "FLWR_LOG_LEVEL" in os.environ:
        yield
        return

    def keep(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
        words.extend(data.get("lines", ()))

    try:
        logger.handlers, logger.propagate = [_Keep(words)], False
        if printing is not None:
            worker.print_to_stdstream = keep
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagates
        if printing is not None:
            worker.print_to_stdstream = printing
