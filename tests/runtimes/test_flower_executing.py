"""A client's messages are carried out in forks: each is answered, also when its fork dies."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("flwr")

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.app.error import Error
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from fedfuse.core.errors import FedfuseError
from fedfuse.runtimes.flower import executing
from fedfuse.runtimes.flower.executing import Executor, SuperNode, answer
from fedfuse.runtimes.flower.hosting import SuperLink
from fedfuse.runtimes.flower.processes import Child, free_port


class FakeRuntime:
    """What a SuperNode says to its executor: one message, and where answers go."""

    def __init__(self, folder: Path, tokens: list[str]) -> None:
        self.folder, self.tokens = folder, tokens

    def __enter__(self) -> FakeRuntime:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass

    def AcquireTask(self, request: Any) -> Any:
        if self.tokens and self.tokens[0] == "unreachable":
            self.tokens.pop(0)
            raise httpx.ConnectError("refused")
        return SimpleNamespace(token=self.tokens.pop(0) if self.tokens else "")

    def SendTaskHeartbeat(self, request: Any) -> Any:
        return SimpleNamespace(success=True)


@pytest.fixture
def context() -> Context:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 2
    return Context(1, 2, {}, RecordDict(), {})


def question(kind: str = "query.name") -> Message:
    message = Message(RecordDict({"c": ConfigRecord({"x": 1})}), 2, kind)
    message.metadata.__dict__["_message_id"] = "m"
    return message


def run_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    context: Context,
    handle: Callable[[Message, Context], Message],
    tokens: list[str] | None = None,
) -> list[str]:
    """What an executor pushes for one message, as lines."""
    pushed = tmp_path / "pushed"
    runtime = FakeRuntime(tmp_path, ["token"] if tokens is None else tokens)

    def push(client: Any, reply: Message, context: Context) -> None:
        words = reply.error.reason if reply.has_error() else "content"
        with pushed.open("a") as file:
            file.write(f"{words}\n")

    def output(client: Any, context: Context, status: str, details: str) -> None:
        with pushed.open("a") as file:
            file.write(f"{status}\n")

    app = ClientApp()
    app.query("name")(handle)
    monkeypatch.setattr(executing, "_runtime", lambda *_: runtime)
    monkeypatch.setattr(executing, "pull_task_input", lambda client: (question(), context, None, None))
    monkeypatch.setattr(executing, "push_message", push)
    monkeypatch.setattr(executing, "push_task_output", output)
    monkeypatch.setattr(executing, "build_client_app", lambda open_node: app)
    supernode = SimpleNamespace(port=1, secret=b"secret")
    executor = Executor(None, supernode)  # type: ignore[arg-type]
    deadline = time.monotonic() + 30
    while not pushed.exists() or executor.is_busy or len(pushed.read_text().splitlines()) < 2:
        executor.step()
        time.sleep(0.01)
        assert time.monotonic() < deadline
    executor.close()
    return pushed.read_text().splitlines()


def test_an_answer_is_pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: Context) -> None:
    tokens = ["unreachable", "", "token"]
    lines = run_one(tmp_path, monkeypatch, context, lambda m, c: Message(RecordDict(), reply_to=m), tokens)
    assert lines == ["content", "completed"]


def test_an_error_is_pushed_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: Context) -> None:
    def fail(message: Message, context: Context) -> Message:
        raise ValueError("seven")

    assert run_one(tmp_path, monkeypatch, context, fail) == ["ValueError: seven", "failed"]


def test_a_fork_that_dies_is_answered_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: Context) -> None:
    def die(message: Message, context: Context) -> Message:
        os._exit(3)

    lines = run_one(tmp_path, monkeypatch, context, die)
    assert lines == ["the client's process died (exit code 3)", "failed"]


def test_what_the_app_does_not_know_is_answered(context: Context) -> None:
    reply = answer(ClientApp(), question("query.unknown"), context)
    assert isinstance(reply.error, Error)
    assert reply.metadata.reply_to_message_id == "m"


def test_a_supernode_without_tls_takes_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(Child, "start", lambda self: started.append(self))
    plain = SuperNode(tmp_path / "a", "host:1", None, None, "a")
    assert not plain.is_running
    plain.stop()
    plain.start()
    keyed = SuperNode(tmp_path / "b", "host:1", tmp_path / "ca.pem", tmp_path / "b.key", "b")
    keyed.start()
    first, second = (child.arguments for child in started)
    assert "--insecure" in first
    assert "--root-certificates" not in first
    assert "--insecure" not in second
    assert second[second.index("--auth-supernode-private-key") + 1] == str(tmp_path / "b.key")
    assert (tmp_path / "a" / "secret").stat().st_mode & 0o777 == 0o600
    assert plain.secret != keyed.secret


def test_a_superlink_needs_a_port_of_its_own(tmp_path: Path) -> None:

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(FedfuseError) as caught:
            SuperLink(tmp_path, "127.0.0.1", port, None).start()
    assert str(caught.value) == (
        f"another program listens on this address\n  where: 127.0.0.1:{port}\n"
        "  fix:   stop it, or name another --address"
    )


def test_a_superlink_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho no memory\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    superlink = SuperLink(tmp_path, "127.0.0.1", free_port(), None)
    with pytest.raises(FedfuseError) as caught:
        superlink.start()
    assert caught.value.what == "Flower's SuperLink did not start:\nno memory"
    assert caught.value.fix == f"see {tmp_path / 'superlink.log'}"
    assert superlink.lost(OSError("x")).what == "the SuperLink ended with code 1: OSError: x"


@pytest.mark.parametrize(
    ("host", "own"),
    [("0.0.0.0", "127.0.0.1:9"), ("::", "[::1]:9"), ("10.0.0.5", "10.0.0.5:9"), ("fe80::1", "[fe80::1]:9")],
)
def test_the_server_s_own_way_to_its_superlink(tmp_path: Path, host: str, own: str) -> None:
    superlink = SuperLink(tmp_path, host, 9, None)
    assert superlink.own_address == own
    assert superlink.root_certificates is None
