"""All clients on Flower's simulation engine: on this machine or on a Ray cluster, many at a time."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fedfuse.core.client import ClientSide, Reply, Request
from fedfuse.core.cohort import ClientFacts
from fedfuse.core.errors import ConfigError
from fedfuse.core.registry import METHODS, register_runtime
from fedfuse.runtimes.flower.leftovers import guarded
from fedfuse.runtimes.flower.spool import Spool, module_of

if TYPE_CHECKING:
    from flwr.app import Message

    from fedfuse.runtimes.flower.engine import Engine

_POLL_S = 0.02
_LOOKS_AT_ENGINE_S = 1.0
_TTL_S = 30 * 24 * 3600.0
_IN_FLIGHT_BYTES = 256 << 20
"""Messages on their way, both directions; more of them would only wait elsewhere, in the server's memory."""

_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",
}
"""Nothing is reported to anybody, and nothing starts Ray by accident, unless the user has set otherwise."""


@register_runtime("flower-simulation")
@dataclass(frozen=True, kw_only=True)
class FlowerSimulation:
    """Clients on Flower's simulation engine (Ray), on this machine or a cluster.

    Args:
        client_threads: torch threads of a client's computation; their number changes bits, so it is part of every
            question.
        cpus_per_client: cores that one client takes, which says how many compute at once; ``None`` is as many as it
            has threads.
        gpus_per_client: GPUs that one client takes: a share such as 0.25, or a whole number.
        device: where clients compute: ``cpu``, ``cuda``, or ``auto``: cuda where clients have a GPU or a share.
        cpus: cores of this machine to use; ``None`` is all.
        address: of a running Ray cluster, such as ``auto`` or ``ray-head:6379``; ``None`` starts Ray here.
        spool: folder for clients' data on its way to Ray's processes, needed on a cluster, where all machines must see
            it (and the run's folder) under the same path; ``None`` is a temporary one.
        codec: how messages are compressed.
    """

    client_threads: int = 1
    cpus_per_client: float | None = None
    gpus_per_client: float = 0.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpus: int | None = None
    address: str | None = None
    spool: str | None = None
    codec: Literal["none", "zlib"] = "none"

    def __post_init__(self) -> None:
        for name, value in (("client_threads", self.client_threads), ("cpus", self.cpus)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}", where=f"runtime.{name}", fix="give at least 1")
        if self.cpus_per_client is not None and not 0 < self.cpus_per_client < float("inf"):
            raise ConfigError(
                f"cpus_per_client is {self.cpus_per_client:g}", where="runtime.cpus_per_client", fix="give more than 0"
            )
        gpus = self.gpus_per_client
        if not 0 <= gpus < float("inf") or (gpus > 1 and gpus != int(gpus)):
            raise ConfigError(
                f"gpus_per_client is {gpus:g}",
                where="runtime.gpus_per_client",
                fix="give 0, a share below 1, or a whole number",
            )
        if self.device == "cuda" and not gpus:
            raise ConfigError(
                "clients on cuda have no GPU", where="runtime.gpus_per_client", fix="give a share, such as 0.25"
            )
        if self.device == "cpu" and gpus:
            raise ConfigError(
                f"clients on the cpu take {gpus:g} GPUs", where="runtime.device", fix="use device: auto or cuda"
            )
        if self.address is None:
            self._check_own_machine()
        elif self.cpus is not None:
            raise ConfigError(
                "cpus is for this machine, and address names a cluster",
                where="runtime.cpus",
                fix="leave one of them out; the cluster knows its own cores",
            )
        elif self.spool is None:
            raise ConfigError(
                "clients' data has no way to the cluster",
                where="runtime.spool",
                fix="name a folder that all machines of the cluster share",
            )

    def _check_own_machine(self) -> None:
        cpus, wanted = self._own_cpus(), self._cpus_per_client()
        if wanted > cpus:
            raise ConfigError(
                f"a client wants {wanted:g} cores, and {cpus} are to be used",
                where="runtime.cpus_per_client",
                fix="lower it, or raise runtime.cpus",
            )
        num_gpus = torch.cuda.device_count() if self.gpus_per_client else 0
        if self.gpus_per_client > num_gpus:
            raise ConfigError(
                f"a client wants {self.gpus_per_client:g} GPUs, and this machine has {num_gpus}",
                where="runtime.gpus_per_client",
                fix="lower it, or name a cluster by runtime.address",
            )

    def _own_cpus(self) -> int:
        if self.cpus is not None:
            return self.cpus
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def _cpus_per_client(self) -> float:
        return float(self.client_threads) if self.cpus_per_client is None else self.cpus_per_client

    def client_device(self) -> torch.device:
        """The device that clients compute on."""
        return torch.device("cuda" if self.gpus_per_client else "cpu")

    def open(self, sides: Mapping[str, ClientSide]) -> FlowerSimulationRuntime:
        """Start the engine.

        Args:
            sides: client id to its machine.

        Raises:
            ConfigError: Flower or Ray is missing, or a model has no recipe.
        """
        if any(importlib.util.find_spec(name) is None for name in ("flwr", "ray")):
            raise ConfigError(
                "the runtime flower-simulation needs Flower and Ray",
                where="runtime.name",
                fix='pip install "fedfuse[simulation]"',
            )
        # Flower and Ray read these when they are imported.
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from fedfuse.runtimes.flower.carrier import build_carrier_app
        from fedfuse.runtimes.flower.engine import Engine

        with ExitStack() as stack:
            if self.spool is not None:
                Path(self.spool).mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="fedfuse-spool-", dir=self.spool)).resolve()
            stack.enter_context(guarded(folder))
            spool = Spool(folder)
            spool.write(sides.values())
            engine = Engine(
                build_carrier_app(folder),
                cpus=None if self.address else self._own_cpus(),
                cpus_per_client=self._cpus_per_client(),
                gpus_per_client=self.gpus_per_client,
                address=self.address,
                num_clients=len(sides),
            )
            stack.callback(engine.close)
            # Called first: what is still at work would keep the engine waiting.
            stack.callback(spool.stop.touch)
            facts = {
                client_id: ClientFacts(side.data.fingerprint, side.num_threads, side.device.type)
                for client_id, side in sorted(sides.items())
            }
            sizes = {client_id: len(side.data.train) for client_id, side in sides.items()}
            return FlowerSimulationRuntime(engine, facts, sizes, codec=self.codec, ending=stack.pop_all())


class FlowerSimulationRuntime:
    """The running form of :class:`FlowerSimulation`.

    Few requests are on their way at a time, however many clients there are, so that the server's memory stays flat.

    Args:
        engine: the running engine.
        facts: client id to what the server knows of it.
        sizes: client id to how many examples it has.
        codec: how messages are compressed.
        ending: what ends all of it.
    """

    def __init__(
        self,
        engine: Engine,
        facts: Mapping[str, ClientFacts],
        sizes: Mapping[str, int],
        *,
        codec: Literal["none", "zlib"],
        ending: ExitStack,
    ) -> None:
        self._engine, self._facts, self._sizes, self._codec, self._ending = engine, facts, sizes, codec, ending
        self._idle = sorted(engine.grid.get_node_ids())
        self._asked: dict[str, tuple[Request, int, int]] = {}
        self._modules: dict[str, str] = {}
        self._largest_upload_bytes = 0

    def clients(self) -> Mapping[str, ClientFacts]:
        """All clients by id."""
        return self._facts

    def exchange(
        self, requests: Sequence[Request], *, timeout_s: float | None, progress: Callable[[str, int, int], None]
    ) -> Iterator[Reply]:
        """Carry out requests and yield each reply when it is there.

        Args:
            requests: at most one per client.
            timeout_s: most seconds that one client may take, waiting for a free process apart; ``None`` is no limit.
            progress: not used: Ray's processes tell nothing before they are done.

        Yields:
            A reply per request.
        """
        # The longest first: otherwise the last client alone may keep one process busy at the end.
        waiting = deque(sorted(requests, key=lambda r: (-self._sizes[r.client_id], r.client_id)))
        wanted, packed = {request.answer_key for request in requests}, _Packed(self._codec)
        looked_at = time.monotonic()
        while wanted:
            while waiting and self._has_room(waiting[0]):
                self._push(waiting.popleft(), packed, timeout_s)
            is_quiet = True
            for message in self._engine.grid.pull_messages(list(self._asked)):
                request, node_id, sent_bytes = self._asked.pop(message.metadata.reply_to_message_id)
                self._idle.append(node_id)
                # An exchange that was left half-way may have left answers that nobody waits for.
                if request.answer_key in wanted:
                    wanted.discard(request.answer_key)
                    is_quiet = False
                    yield self._read(message, request, sent_bytes)
            if is_quiet:
                time.sleep(_POLL_S)
            if time.monotonic() - looked_at > _LOOKS_AT_ENGINE_S:
                looked_at = time.monotonic()
                _ = self._engine.grid

    def close(self) -> None:
        """End the engine, also while clients are at work."""
        self._ending.close()

    def _has_room(self, request: Request) -> bool:
        if not self._idle:
            return False
        each = max(1, len(request.payload) + self._largest_upload_bytes)
        room = _IN_FLIGHT_BYTES // each if self._largest_upload_bytes else 0
        return len(self._asked) < max(2 * self._engine.num_workers, room)

    def _push(self, request: Request, packed: _Packed, timeout_s: float | None) -> None:
        from flwr.app import Message

        from fedfuse.runtimes.flower.codec import request_header, wire_bytes

        if request.method not in self._modules:
            self._modules[request.method] = module_of(METHODS, request.method)
        header = {
            "request": request_header(request),
            "module": self._modules[request.method],
            "timeout_s": timeout_s,
            "codec": self._codec,
        }
        content, node_id = packed.message(header, request.payload), self._idle.pop()
        ids = list(self._engine.grid.push_messages([Message(content, node_id, "train", ttl=_TTL_S)]))
        if not ids:
            raise self._engine.lost()
        self._asked[ids[0]] = (request, node_id, wire_bytes(content))

    def _read(self, message: Message, request: Request, sent_bytes: int) -> Reply:
        from fedfuse.runtimes.flower.carrier import NO_LIMIT
        from fedfuse.runtimes.flower.codec import decode_message, plain_words, wire_bytes

        if message.has_error():
            words = plain_words(message.error.reason or "no reason").strip().splitlines()[-1]
            reason = f"its process could not carry out the request: {words}"
            return Reply(request.client_id, error=reason, answer_key=request.answer_key)
        header, body = decode_message(message.content, max_bytes=NO_LIMIT)
        self._largest_upload_bytes = max(self._largest_upload_bytes, len(body))
        crossed: dict[str, Any] = {
            "upload_wire_bytes": wire_bytes(message.content),
            "download_wire_bytes": sent_bytes,
            "upload": body if header.pop("has_upload") else None,
        }
        return Reply(**{**header, **crossed})


class _Packed:
    """Messages of one exchange; what all clients are sent is packed once."""

    def __init__(self, codec: Literal["none", "zlib"]) -> None:
        self._codec: Literal["none", "zlib"] = codec
        self._payload: bytes | None = None
        self._content: Any = None

    def message(self, header: Mapping[str, Any], payload: bytes) -> Any:
        from fedfuse.runtimes.flower.codec import encode_message, with_header

        if self._payload is None or self._payload is not payload:
            self._payload, self._content = payload, encode_message({}, payload, codec=self._codec)
        return with_header(self._content, header)
