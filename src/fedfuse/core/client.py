"""The client's side: what a task sees, and how one request is carried out."""

from __future__ import annotations

import hashlib
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.coding import Coding, codec_of
from fedfuse.core.errors import FedfuseError, JournalError, PayloadError, TaskError, UploadRefused
from fedfuse.core.examples import ClientData
from fedfuse.core.files import write_atomically
from fedfuse.core.known import Known
from fedfuse.core.payload import Payload, matches
from fedfuse.core.registry import METHODS
from fedfuse.core.release import release
from fedfuse.core.seeding import Rng
from fedfuse.core.settings import from_json

_UNSENT = ".unsent"
"""After a question's key: the state that the codec keeps, apart from the task's."""


def _silent(done: int, total: int) -> None:
    pass


@dataclass
class Client:
    """What a client task sees of its client.

    Args:
        id: its name.
        data: its examples; they never leave.
        model: the architecture and first weights that it owns.
        state: what it keeps from exchange to exchange; declared by ``client_task(state=True)``.
        rng: its random source for this exchange.
        device: where it computes.
        progress: called with (done, total) during long work.
    """

    id: str
    data: ClientData
    model: ModelSpec
    state: Payload
    rng: Rng
    device: torch.device
    progress: Callable[[int, int], None] = _silent


@dataclass(frozen=True)
class Request:
    """One question to one client; all that a client's side gets from the server.

    Args:
        method: the method's name in the registry.
        settings: the method's settings as JSON.
        task: name of the task.
        exchange: key of the exchange.
        client_id: who is asked.
        seed: seed of the client's random source for this exchange.
        lineage: names the client's state that the task must find; empty for a fresh client.
        answer_key: content key of the answer; names the state that the task leaves behind.
        payload: the encoded message.
        release: what is done to the upload before it leaves, for differential privacy; empty is nothing.
        codec: how the upload is said in fewer bytes after that; empty is not at all.
        unsent: answer key of the exchange after which the client kept what the codec left out; empty for the first.
    """

    method: str
    settings: Mapping[str, Any]
    task: str
    exchange: str
    client_id: str
    seed: int
    lineage: str
    answer_key: str
    payload: bytes
    release: Mapping[str, Any] = field(default_factory=dict)
    codec: Mapping[str, Any] = field(default_factory=dict)
    unsent: str = ""


@dataclass(frozen=True)
class Reply:
    """What comes back for a request.

    Args:
        client_id: who answers.
        upload: encoded payload; ``None`` if the client failed.
        error: why it failed; empty if it did not.
        breaks_contract: the method itself is wrong, not the client: the run must stop.
        seconds: time that the task took.
        peak_rss_bytes: most memory that its process held during the task.
        answer_key: the question that the upload answers.
        upload_wire_bytes: bytes that crossed to bring the upload; 0 where nobody measured them.
        download_wire_bytes: bytes that crossed to bring the request; 0 where nobody measured them.
    """

    client_id: str
    upload: bytes | None = None
    error: str = ""
    breaks_contract: bool = False
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    answer_key: str = ""
    upload_wire_bytes: int = 0
    download_wire_bytes: int = 0


class StateStore:
    """Where clients keep their state between exchanges.

    A state is kept once under its content's digest, and a pointer for each exchange after which the client had it: many
    exchanges that only read a state cost no more than one.

    Args:
        folder: of the states; ``None`` keeps them in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._memory: dict[tuple[str, str], bytes] = {}

    def load(self, client_id: str, lineage: str) -> Payload:
        """The state that a client had after an exchange.

        Args:
            client_id: whose.
            lineage: the exchange's answer key; empty for the state before any exchange.

        Raises:
            JournalError: it is not there.
        """
        if not lineage:
            return Payload()
        try:
            digest = self._read(client_id, f"{lineage}.state").decode("ascii")
            data = self._read(client_id, f"{digest}.safetensors")
            if hashlib.sha256(data).hexdigest() == digest:
                return Payload.decode(data)
        except (OSError, KeyError, ValueError, PayloadError):
            pass
        raise JournalError(
            f"the state of {client_id} after an earlier exchange is gone or damaged",
            where=str(self.folder or "memory"),
            fix="delete the run's journal and start again, or leave this client out",
        )

    def save(self, client_id: str, lineage: str, state: Payload) -> None:
        """Keep a state under the key of the answer that came with it.

        Args:
            client_id: whose.
            lineage: the answer's key.
            state: what to keep.
        """
        data = state.encode()
        digest = hashlib.sha256(data).hexdigest()
        self._write(client_id, f"{digest}.safetensors", data)
        # Written last: a pointer never leads to nothing.
        self._write(client_id, f"{lineage}.state", digest.encode("ascii"))

    def _read(self, client_id: str, name: str) -> bytes:
        if self.folder is None:
            return self._memory[client_id, name]
        return (self.folder / client_id / name).read_bytes()

    def _write(self, client_id: str, name: str, data: bytes) -> None:
        if self.folder is None:
            self._memory[client_id, name] = data
            return
        path = self.folder / client_id / name
        # The name of a content is its digest, but the file may have been damaged since.
        if not (path.suffix == ".safetensors" and path.is_file() and path.read_bytes() == data):
            write_atomically(path, data)


@dataclass(frozen=True)
class ClientSide:
    """All that one client's machine holds.

    Args:
        id: the client's name.
        data: its examples.
        model: its model.
        device: where it computes.
        num_threads: torch threads; fixed, because their number changes bits.
        states: where its state is kept.
        secret: makes the noise of private uploads, so that nobody else can take it away; empty in a simulation, where
            the noise comes from the run's seed.
        release: what its owner agreed shall be done to uploads before they leave; ``None`` does what is asked.
    """

    id: str
    data: ClientData
    model: ModelSpec
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    num_threads: int = 1
    states: StateStore = field(default_factory=StateStore)
    secret: bytes = field(default=b"", repr=False)
    release: Mapping[str, Any] | None = None


def perform(request: Request, side: ClientSide, progress: Callable[[int, int], None] = _silent) -> Reply:
    """Carry out one request on the client's side.

    The method is rebuilt from its settings; nothing else of the server's is seen. A failure of the task becomes a
    reply that says so; it never takes the runtime down.

    Args:
        request: what is asked.
        side: the client's machine.
        progress: called with (done, total) during long work.

    Returns:
        The upload, encoded, or the reason why there is none.
    """
    from fedfuse.core.method import TaskView

    start = time.perf_counter()
    reset_peak_rss()
    try:
        method = from_json(METHODS.get(request.method), request.settings, where="method")
        spec = method.tasks()[request.task]
        state = side.states.load(side.id, request.lineage) if spec.keeps_state else Payload()
        rng = Rng(request.seed, side.secret)
        if side.release is not None and dict(side.release) != dict(request.release):
            raise UploadRefused(
                "the server asks for an upload under other terms of privacy than were agreed on",
                where=f"client {side.id}",
                fix="ask the server's operator which section privacy holds",
            )
        client = Client(side.id, side.data, side.model, state, rng, side.device, progress)
        task = getattr(TaskView(method, spec), request.task)
        with fixed_threads(side.num_threads), rng.ambient("task"):
            upload = task(client, Payload.decode(request.payload))
        if not isinstance(upload, Payload):
            raise TaskError(
                f'the task "{spec.name}" returned a {type(upload).__name__}',
                where=request.method,
                fix="return a Payload",
            )
        for key in upload:
            if not matches(key, spec.uploads):
                raise TaskError(
                    f'the task "{spec.name}" uploads "{key}" that it did not declare',
                    where=request.method,
                    fix="add it to @client_task(uploads=...) or do not send it",
                )
        if spec.keeps_state:
            side.states.save(side.id, request.answer_key, client.state)
        elif len(client.state):
            raise TaskError(
                f'the task "{spec.name}" writes client.state without declaring it',
                where=request.method,
                fix="use @client_task(..., state=True)",
            )
        if request.release:
            upload = release(upload, request.release, request.payload, side.model, rng)
        if request.codec:
            upload = _coded(upload, request, side, rng)
        data = upload.encode()
    except (Exception, SystemExit) as error:  # whatever a task of anybody's does, it costs only this client
        reason = (
            str(error) if isinstance(error, FedfuseError) else f"{type(error).__name__}: {error} ({_last_place(error)})"
        )
        return Reply(
            side.id,
            error=reason,
            breaks_contract=isinstance(error, TaskError),
            seconds=time.perf_counter() - start,
            answer_key=request.answer_key,
        )
    return Reply(
        side.id,
        upload=data,
        seconds=time.perf_counter() - start,
        peak_rss_bytes=peak_rss_bytes(),
        answer_key=request.answer_key,
    )


def _coded(upload: Payload, request: Request, side: ClientSide, rng: Rng) -> Payload:
    """The upload in the codec's words; what these leave out is kept for the next answer to the same task."""
    coding = Coding(codec_of(request.codec), Known.of(request.payload, side.model))
    unsent = side.states.load(side.id, f"{request.unsent}{_UNSENT}" if request.unsent else "")
    coded, left = coding.encode(upload, unsent, rng)
    if coding.codec.keeps_unsent:
        side.states.save(side.id, f"{request.answer_key}{_UNSENT}", left)
    return coded


def _last_place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown place"


@contextmanager
def fixed_threads(num_threads: int) -> Iterator[None]:
    """Compute with a fixed number of torch threads for a while.

    Args:
        num_threads: at least 1.

    Yields:
        Nothing.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reset_peak_rss() -> None:
    """Start measuring the peak of this process's memory anew, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_rss_bytes() -> int:
    """Most resident memory of this process since the last reset (since its start where there is no reset)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
