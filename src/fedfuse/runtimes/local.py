"""All clients on this machine: one after another, or over worker processes; the same bits either way."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

import torch

from fedfuse.core.client import ClientSide, Reply, Request, perform
from fedfuse.core.cohort import ClientFacts
from fedfuse.core.errors import ConfigError
from fedfuse.core.registry import register_runtime

_WORTH_IT_S = 0.3
"""Work that would take longer than this in one process is given to workers; forking two costs about 0.05 s."""


@register_runtime("local")
@dataclass(frozen=True, kw_only=True)
class Local:
    """Clients in this process or over worker processes on this machine.

    Args:
        workers: worker processes; ``None`` is one per core, 1 keeps everything in this process.
        client_threads: torch threads of a client's computation; their number changes bits, so it is part of every
            question.
        device: where clients compute: ``cpu``, ``cuda`` (in this process), or ``auto``: cuda where there is one.
    """

    workers: int | None = None
    client_threads: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        for name, value in (("workers", self.workers), ("client_threads", self.client_threads)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}", where=f"runtime.{name}", fix="give at least 1")

    def client_device(self) -> torch.device:
        """The device that clients compute on.

        Raises:
            ConfigError: cuda was asked for and there is none.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("there is no CUDA device", where="runtime.device", fix="use device: cpu or auto")
        kind = "cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu"
        return torch.device(kind)

    def open(self, sides: Mapping[str, ClientSide]) -> LocalRuntime:
        """Start the runtime.

        Args:
            sides: client id to its machine.
        """
        return LocalRuntime(sides, workers=self.workers)


class LocalRuntime:
    """The running form of :class:`Local`.

    Workers are forked, so that they inherit data and user modules without any encoding of code; every message to and
    from them is an encoded payload behind a JSON header.

    Args:
        sides: client id to its machine.
        workers: worker processes; ``None`` is one per core.
    """

    def __init__(self, sides: Mapping[str, ClientSide], *, workers: int | None = None) -> None:
        self._sides = dict(sorted(sides.items()))
        # A state that a worker keeps in its memory would be lost to the others.
        can_fork = sys.platform == "linux" and all(
            side.device.type == "cpu" and side.states.folder is not None for side in self._sides.values()
        )
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._num_workers = min(workers or available, len(self._sides)) if can_fork else 1
        self._can_fork = can_fork
        self._workers: list[_Worker] = []
        self._seconds_by_task: dict[str, float] = {}

    def clients(self) -> Mapping[str, ClientFacts]:
        """All clients by id."""
        return {
            client_id: ClientFacts(side.data.fingerprint, side.num_threads, side.device.type)
            for client_id, side in self._sides.items()
        }

    def exchange(
        self, requests: Sequence[Request], *, timeout_s: float | None, progress: Callable[[str, int, int], None]
    ) -> Iterator[Reply]:
        """Carry out requests and yield each reply when it is there.

        The first are carried out in this process; once that has taken long enough for workers to pay, the rest goes
        to them. A time limit needs a process that can be stopped, so then workers are used from the start.

        Args:
            requests: at most one per client.
            timeout_s: most seconds that one client may take; ``None`` is no limit.
            progress: called with (client id, done, total) during long work.

        Yields:
            A reply per request.
        """
        # The longest first: otherwise the last client alone may keep one worker busy at the end.
        queue = sorted(requests, key=lambda r: (-len(self._sides[r.client_id].data.train), r.client_id))
        expected_s = self._seconds_by_task.get(queue[0].task, 0.0) * len(queue) if queue else 0.0
        start = time.perf_counter()
        while queue:
            must = timeout_s is not None and self._can_fork
            worth = (
                self._num_workers > 1 and len(queue) > 1 and max(expected_s, time.perf_counter() - start) > _WORTH_IT_S
            )
            if must or worth:
                yield from self._over_workers(queue, timeout_s, progress)
                return
            request = queue.pop(0)
            reply = perform(request, self._sides[request.client_id], partial(progress, request.client_id))
            self._seconds_by_task[request.task] = reply.seconds
            yield reply

    def _over_workers(
        self, queue: list[Request], timeout_s: float | None, progress: Callable[[str, int, int], None]
    ) -> Iterator[Reply]:
        waiting = list(queue)
        while len(self._workers) < min(self._num_workers, len(queue)):
            self._workers.append(_Worker(self._sides))
        try:
            while waiting or any(worker.request for worker in self._workers):
                for index, worker in enumerate(self._workers):
                    if waiting and worker.request is None:
                        request = waiting.pop(0)
                        if not worker.give(request):
                            self._workers[index] = _Worker(self._sides)
                            self._workers[index].give(request)
                busy = [worker for worker in self._workers if worker.request]
                ready = wait([worker.pipe for worker in busy], timeout=_patience(busy, timeout_s))
                for worker in busy:
                    reply = None
                    if worker.pipe in ready:
                        reply = worker.receive(progress)
                    elif timeout_s is not None and worker.busy_s > timeout_s:
                        reply = Reply(worker.client_id, error=f"no reply within {timeout_s:g} s", seconds=worker.busy_s)
                        worker.stop()
                    if reply is not None:
                        if worker.is_stopped:
                            self._workers[self._workers.index(worker)] = _Worker(self._sides)
                        worker.request = None
                        yield reply
        except BaseException:
            # Left half-way (an error above, or Ctrl-C): the workers' answers would belong to nobody.
            self.close()
            raise

    def close(self) -> None:
        """Stop the workers."""
        for worker in self._workers:
            worker.stop()
        self._workers = []


def _patience(busy: Sequence[_Worker], timeout_s: float | None) -> float | None:
    if timeout_s is None:
        return None
    return max(0.01, min(timeout_s - worker.busy_s for worker in busy) + 0.01)


class _Worker:
    """The parent's handle of one worker process."""

    def __init__(self, sides: Mapping[str, ClientSide]) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.pipe, sides, os.getpid()), daemon=True)
        self.process.start()
        theirs.close()
        self.request: Request | None = None
        self.is_stopped = False
        self._since = 0.0

    @property
    def client_id(self) -> str:
        assert self.request is not None
        return self.request.client_id

    @property
    def busy_s(self) -> float:
        return time.monotonic() - self._since

    def give(self, request: Request) -> bool:
        """Hand over a request; false if the process is gone."""
        self._since = time.monotonic()
        try:
            self.pipe.send_bytes(_frame({k: v for k, v in asdict(request).items() if k != "payload"}, request.payload))
        except OSError:
            self.stop()
            return False
        self.request = request
        return True

    def receive(self, progress: Callable[[str, int, int], None]) -> Reply | None:
        """Read what the process says: its reply, or nothing yet if it only told how far it is."""
        client_id = self.client_id
        try:
            header, upload = _unframe(self.pipe.recv_bytes())
        except (EOFError, OSError):
            self.process.join(1)
            code = self.process.exitcode
            self.stop()
            return Reply(client_id, error=f"its worker process died (exit code {code})", seconds=self.busy_s)
        if "done" in header:
            progress(client_id, header["done"], header["total"])
            return None
        has_upload = header.pop("has_upload")
        return Reply(**header, upload=upload if has_upload else None)

    def stop(self) -> None:
        self.is_stopped = True
        with suppress(OSError, ValueError):
            self.process.kill()
            self.process.join()
        self.pipe.close()


def _frame(header: Mapping[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def _unframe(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _serve(pipe: Connection, parents_end: Connection, sides: Mapping[str, ClientSide], parent: int) -> None:
    """A worker's life: carry out requests until the pipe closes."""
    parents_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A parent that is killed must not leave workers behind that go on computing.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        return
    torch.set_num_threads(1)
    with suppress(EOFError, OSError):
        while True:
            header, payload = _unframe(pipe.recv_bytes())
            request = Request(**header, payload=payload)
            told = 0.0

            def tell(done: int, total: int) -> None:
                nonlocal told
                if time.monotonic() - told > 0.2:
                    told = time.monotonic()
                    pipe.send_bytes(_frame({"done": done, "total": total}, b""))

            reply = perform(request, sides[request.client_id], tell)
            facts = {k: v for k, v in asdict(reply).items() if k != "upload"}
            pipe.send_bytes(_frame({**facts, "has_upload": reply.upload is not None}, reply.upload or b""))
