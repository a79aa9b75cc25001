"""A client's side of a deployment: a SuperNode as a child process, and its messages carried out by our own ClientApp.

A SuperNode by itself runs whatever program the server sends along with a run. Here it runs in Flower's ``process``
isolation and starts nothing: this process takes each message and answers it with the ClientApp of the fedfuse that is
installed, in a fork of its own, so that a task that dies takes nothing with it. No code of the server ever runs here.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import secrets
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import httpx
from flwr.app import Context, Message
from flwr.app.error import Error
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode, SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from fedfuse.core.files import write_atomically
from fedfuse.runtimes.flower.node import Node, build_client_app
from fedfuse.runtimes.flower.processes import Child, flower_environment, free_port
from fedfuse.runtimes.flower.programs import die_with_parent

_NUM_TRIES = 5
_PAUSE_S = 0.5
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"


_GIVEN_UP = "SSL/TLS handshake error detected"


class SuperNode:
    """Flower's SuperNode as a child process.

    Args:
        folder: for its log and the secret that its messages are taken with.
        server: ``HOST:PORT`` of the SuperLink.
        ca: certificate to check the server's with; ``None`` is without TLS and without a key.
        key: the node's private key.
        name: of the client, shown to whoever looks at the node.
    """

    def __init__(self, folder: Path, server: str, ca: Path | None, key: Path | None, name: str) -> None:
        self.folder, self.server, self.ca, self.key, self.name = folder, server, ca, key, name
        self._secret = folder / "secret"
        self.port = 0
        self.child: Child | None = None

    @property
    def is_running(self) -> bool:
        """Whether the process is there."""
        return self.child is not None and self.child.is_running

    @property
    def has_given_up(self) -> bool:
        """Whether the process is there and will never reach its server again.

        Flower takes a connection that breaks in the TLS handshake for a lasting fault, and goes silent.
        """
        return self.child is not None and self.child.is_running and _GIVEN_UP in self.child.output()

    @property
    def secret(self) -> bytes:
        """What this process proves with that it may take messages."""
        return self._secret.read_bytes()

    def start(self) -> None:
        """Start the process; it goes on trying to reach the server by itself."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._secret.exists():
            write_atomically(self._secret, secrets.token_hex(32).encode())
            os.chmod(self._secret, 0o600)
        self.port = free_port()
        arguments = ["--superlink", self.server, "--isolation", "process"]
        arguments += ["--host", "127.0.0.1", "--port", str(self.port)]
        arguments += ["--superexec-auth-secret-file", str(self._secret), "--node-config", f'name="{self.name}"']
        if self.ca is None:
            arguments += ["--insecure"]
        else:
            arguments += ["--root-certificates", str(self.ca), "--auth-supernode-private-key", str(self.key)]
        self.child = Child(
            "supernode",
            arguments,
            log=self.folder / "supernode.log",
            environment=flower_environment(self.folder / "home"),
            # A node that says goodbye can come back at once; one that is killed only when the server has missed it.
            parting_signal=signal.SIGTERM,
        )
        self.child.start()

    def stop(self) -> None:
        """End the process."""
        if self.child is not None:
            self.child.stop()


class Executor:
    """Takes a SuperNode's messages, one after another, and has each answered by a fork of this process.

    Args:
        node: what the client brings.
        supernode: where messages come in.
    """

    def __init__(self, node: Node, supernode: SuperNode) -> None:
        self._app = build_client_app(lambda context: node)
        self._supernode = supernode
        self._taker: RuntimeHttpClient | None = None
        self._port = 0
        self._fork: BaseProcess | None = None
        self._task: _Task | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a message is being answered."""
        return self._fork is not None

    def step(self) -> bool:
        """Look after the message at hand, or take the next if there is one.

        Returns:
            Whether there was something to do.
        """
        if self._fork is not None:
            if self._fork.is_alive():
                return False
            self._fork.join()
            if self._fork.exitcode != 0 and self._task is not None:
                _report_death(self._task, self._fork.exitcode)
            self._fork.close()
            self._fork = self._task = None
            return True
        token = self._next()
        if token is None:
            return False
        try:
            # Taken here and not in the fork: a message can be taken once, and a fork that dies must be answered for.
            with _runtime(self._port, _token(token)) as client:
                message, context, _, _ = pull_task_input(client)
        except (httpx.HTTPError, OSError, RuntimeError, ValueError):
            return False
        self._task = _Task(self._port, token, message, context)
        arguments = (self._app, self._task, os.getpid())
        self._fork = multiprocessing.get_context("fork").Process(target=_carry_out, args=arguments)
        self._fork.start()
        return True

    def _next(self) -> str | None:
        if self._port != self._supernode.port:
            self._forget()
            self._port = self._supernode.port
        if self._taker is None:
            self._taker = _runtime(
                self._port,
                SuperExecAuthHttpInterceptor(
                    master_secret=self._supernode.secret, protected_methods=frozenset({_ACQUIRE})
                ),
            )
        try:
            found = self._taker.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        except (httpx.HTTPError, OSError):
            # It is starting or ending; whoever watches it says so.
            return None
        return str(found.token) or None

    def _forget(self) -> None:
        if self._taker is not None:
            self._taker.close()
        self._taker = None

    def close(self) -> None:
        """Stop what is at hand."""
        if self._fork is not None:
            self._fork.kill()
            self._fork.join()
            self._fork.close()
            self._fork = None
        self._forget()


def _runtime(port: int, *interceptors: SuperExecAuthHttpInterceptor | RuntimeTokenHttpInterceptor) -> RuntimeHttpClient:
    return RuntimeHttpClient.from_server_address(
        server_address=f"127.0.0.1:{port}",
        insecure=True,
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), *interceptors],
    )


def _token(token: str) -> RuntimeTokenHttpInterceptor:
    return RuntimeTokenHttpInterceptor(token)


@dataclass(frozen=True)
class _Task:
    """One message, and what its answer is pushed with."""

    port: int
    token: str
    message: Message
    context: Context


def _carry_out(app: ClientApp, task: _Task, parent: int) -> None:
    """A fork's whole life: one message."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent(parent, signal.SIGKILL)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    with _runtime(task.port, _token(task.token)) as client:
        heart = HeartbeatSender(make_task_heartbeat_fn_http(client))
        heart.start()
        try:
            _push(client, task, answer(app, task.message, task.context))
        finally:
            heart.stop()
    sys.stdout.flush()
    # Nothing of the parent's may be run down here.
    os._exit(0)


def _report_death(task: _Task, code: int | None) -> None:
    """Answer for a fork that died, so that the server need not wait for it."""
    error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"the client's process died (exit code {code})")
    with suppress(httpx.HTTPError, OSError, RuntimeError), _runtime(task.port, _token(task.token)) as client:
        _push(client, task, Message(error, reply_to=task.message))


def _push(client: RuntimeHttpClient, task: _Task, reply: Message) -> None:
    for attempt in range(_NUM_TRIES):
        try:
            push_message(client, reply, task.context)
            break
        except httpx.TransportError:
            if attempt + 1 == _NUM_TRIES:
                raise
            time.sleep(_PAUSE_S)
    status = SubStatus.FAILED if reply.has_error() else SubStatus.COMPLETED
    push_task_output(client, task.context, status, reply.error.reason or "" if reply.has_error() else "")


def answer(app: ClientApp, message: Message, context: Context) -> Message:
    """What the app says to a message; an error in words if it fails.

    Args:
        app: the client's app.
        message: what came in.
        context: Flower's context.
    """
    try:
        return app(message, context)
    except Exception as error:  # a message that the app does not know must be answered too
        reason = f"{type(error).__name__}: {error}"[:2000]
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
