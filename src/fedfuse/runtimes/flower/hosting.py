"""The server's side of a deployment: a SuperLink of one's own, and a run on it whose ServerApp is this process.

Flower's own way is to start a process for the ServerApp from a file that the run brings along. Here the SuperLink runs
in Flower's ``process`` isolation and this process takes the ServerApp's task itself: the run starts in a tenth of a
second, the terminal stays ours, and a run that a stranger might start is never carried out.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import context_from_proto, run_from_proto
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest, UnregisterNodeRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.serverapp import Grid
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from fedfuse.core.errors import FedfuseError
from fedfuse.core.files import write_atomically
from fedfuse.runtimes.flower.app_folder import app_files
from fedfuse.runtimes.flower.processes import Child, flower_environment, port_is_taken
from fedfuse.runtimes.flower.trust import ServerFiles

_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_START_LIMIT_S = 90.0
_POLL_S = 0.1
_PATIENCE_S = 15.0


class ServerLost(FedfuseError):
    """The SuperLink is gone or does not know the run any more; a new run continues from the journal."""


class SuperLink:
    """Flower's SuperLink as a child process.

    Args:
        folder: for its database, its log and the secret that its tasks are taken with.
        host: the address to listen on.
        port: its port.
        files: the server's certificate; ``None`` is without TLS and without keys.
    """

    def __init__(self, folder: Path, host: str, port: int, files: ServerFiles | None) -> None:
        self.folder, self.host, self.port, self.files = folder, host, port, files
        self._secret = folder / "secret"
        if files is None:
            arguments = ["--insecure"]
        else:
            arguments = ["--ssl-ca-certfile", str(files.ca), "--ssl-certfile", str(files.certificate)]
            arguments += ["--ssl-keyfile", str(files.key), "--enable-supernode-auth"]
        arguments += ["--isolation", "process", "--superexec-auth-secret-file", str(self._secret)]
        arguments += ["--disable-runtime-dependency-installation", "--database", str(folder / "superlink.db")]
        arguments += ["--host", host, "--port", str(port)]
        self.child = Child(
            "superlink",
            arguments,
            log=folder / "superlink.log",
            environment=flower_environment(folder / "home"),
        )

    @property
    def is_running(self) -> bool:
        """Whether the process is there."""
        return self.child.is_running

    @property
    def own_address(self) -> str:
        """Where this machine reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    @property
    def root_certificates(self) -> bytes | None:
        """What its certificate is checked with."""
        return None if self.files is None else self.files.ca.read_bytes()

    @property
    def secret(self) -> bytes:
        """What this process proves with that it may take tasks."""
        return self._secret.read_bytes()

    def start(self) -> None:
        """Start the process and wait until it answers.

        Raises:
            FedfuseError: it does not start; the message holds its last words.
        """
        if port_is_taken(self.host, self.port):
            raise FedfuseError(
                "another program listens on this address",
                where=f"{self.host}:{self.port}",
                fix="stop it, or name another --address",
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._secret.exists():
            write_atomically(self._secret, secrets.token_hex(32).encode())
            os.chmod(self._secret, 0o600)
        self.child.start()
        deadline = time.monotonic() + _START_LIMIT_S
        host, _, port = self.own_address.rpartition(":")
        while self.is_running and time.monotonic() < deadline:
            with suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout=1):
                return
            time.sleep(_POLL_S)
        words = self.child.output(max_bytes=1500).strip()
        self.stop()
        raise FedfuseError(
            f"Flower's SuperLink did not start:\n{words}",
            where=f"{self.host}:{self.port}",
            fix=f"see {self.child.log}",
        )

    def stop(self) -> None:
        """End the process."""
        self.child.stop()

    def control(self) -> ControlHttpClient:
        """A client of its control interface; to be closed."""
        return ControlHttpClient.from_server_address(
            server_address=self.own_address,
            insecure=self.files is None,
            root_certificates=self.root_certificates,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def allow_only(self, keys: Mapping[str, bytes]) -> None:
        """Let in the nodes of these clients and no others.

        Args:
            keys: client name to its node's public key in PEM form.

        Raises:
            ServerLost: it does not answer.
        """
        wanted = set(keys.values())
        try:
            with self.control() as control:
                known: dict[bytes, int] = {}
                for node in control.ListNodes(ListNodesRequest()).nodes_info:
                    if node.status != "unregistered":
                        known[bytes(node.public_key)] = node.node_id
                for public_key, node_id in known.items():
                    if public_key not in wanted:
                        control.UnregisterNode(UnregisterNodeRequest(node_id=node_id))
                for name, public_key in keys.items():
                    if public_key not in known:
                        control.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name))
        except (httpx.HTTPError, OSError) as error:
            raise self.lost(error) from None

    def lost(self, error: BaseException) -> ServerLost:
        """What to say when it does not answer.

        Args:
            error: what was seen.
        """
        code = self.child.exit_code()
        state = "runs but does not answer" if code is None else f"ended with code {code}"
        return ServerLost(
            f"the SuperLink {state}: {type(error).__name__}: {error}",
            where=str(self.child.log),
            fix="run the same command again: what was received is in the journal",
        )


class HostedRun:
    """One Flower run, whose ServerApp this process is.

    Args:
        superlink: a running SuperLink.
    """

    def __init__(self, superlink: SuperLink) -> None:
        self.superlink = superlink
        self._heart: HeartbeatSender | None = None
        self._grid: HttpGrid | None = None

    @property
    def grid(self) -> Grid:
        """Carries messages to nodes."""
        assert self._grid is not None
        return self._grid

    def __enter__(self) -> HostedRun:
        try:
            self._open()
        except (httpx.HTTPError, OSError) as error:
            self._let_go()
            raise self.superlink.lost(error) from None
        return self

    def _open(self) -> None:
        link = self.superlink
        insecure, certificates = link.files is None, link.root_certificates
        fab, _ = build_fab_from_files(app_files())
        with link.control() as control:
            message = Fab(hash_str=hashlib.sha256(fab).hexdigest(), content=fab)
            run_id = control.StartRun(StartRunRequest(fab=message)).run_id
        taker = RuntimeHttpClient.from_server_address(
            server_address=link.own_address,
            insecure=insecure,
            root_certificates=certificates,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperExec"),
                SuperExecAuthHttpInterceptor(master_secret=link.secret, protected_methods=frozenset({_ACQUIRE})),
            ],
        )
        with taker:
            token = _acquire(taker, run_id)
        grid = self._grid = HttpGrid(link.own_address, insecure, certificates, token=token)
        # Flower's own tries for ever, and interrupts the whole process when the run is gone.
        grid._retry_invoker = _patience(link)
        found = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = found.task_id, found.run.run_id
        TaskIdentity.node_id = context_from_proto(found.context).node_id
        grid.set_run(run_from_proto(found.run))
        self._heart = HeartbeatSender(_beat(grid._runtime_client))
        self._heart.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._grid is not None and self.superlink.is_running:
            self._grid._retry_invoker.max_tries = 1
            status = "completed" if error is None else "failed"
            details = "" if error is None else f"{type(error).__name__}: {error}"[:500]
            with suppress(httpx.HTTPError, OSError):
                self._grid._runtime_client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=details))
        self._let_go()

    def _let_go(self) -> None:
        if self._heart is not None and self._heart.is_running:
            self._heart.stop()
        if self._grid is not None:
            self._grid.close()
        self._heart = self._grid = None


def _acquire(taker: RuntimeHttpClient, run_id: int) -> str:
    """Take the ServerApp's task of a run; those of other runs are taken too, and left to expire."""
    deadline = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < deadline:
        found = taker.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
        if found.token and found.task.run_id == run_id:
            return str(found.token)
        if not found.token:
            time.sleep(_POLL_S)
    raise OSError("the SuperLink gave no task for the run")


def _patience(superlink: SuperLink) -> RetryInvoker:
    """Tries for a short while, so that a SuperLink that hangs is noticed; one that is gone at once."""
    return RetryInvoker(
        wait_gen_factory=lambda: exponential(max_delay=2),
        recoverable_exceptions=httpx.TransportError,
        max_tries=None,
        max_time=_PATIENCE_S,
        should_giveup=lambda error: not superlink.is_running,
    )


def _beat(client: RuntimeHttpClient) -> Callable[[], bool]:
    """Shows Flower that the ServerApp lives; whether Flower believes it is seen by the next message."""

    def beat() -> bool:
        try:
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.TransportError:
            return False
        except (httpx.HTTPError, RuntimeError):
            pass
        return True

    return beat


def as_lost(error: BaseException, superlink: SuperLink) -> ServerLost | None:
    """What an error means for the run.

    Args:
        error: anything that came out of a run.
        superlink: that carries it.

    Returns:
        What to say if the SuperLink or the run is gone; ``None`` if the error is about something else.
    """
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, ServerLost):
            return chain
        if isinstance(chain, (httpx.HTTPError, RunNotRunningException)):
            return superlink.lost(chain)
        chain = chain.__cause__ or chain.__context__
    return None
