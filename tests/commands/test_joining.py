"""``fedfuse join``: what it checks before it starts, what it says, and when it ends."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr")

from rich.table import Table

from fedfuse.commands import joining as module
from fedfuse.commands.consent import Consent
from fedfuse.commands.joining import Events, Joining, in_words, join, why_it_ended
from fedfuse.core.errors import ConfigError, FedfuseError
from fedfuse.runtimes.flower.certificates import make_certificates


class Silent:
    """An owner who listens."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def allows(self, table: Table, question: str) -> bool:
        return True


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros((4, 1, 8, 8), dtype=np.float32), y=np.arange(4))
    return path


def joining(tmp_path: Path, data: Path, **changes: Any) -> Joining:
    return Joining(**{"server": "127.0.0.1:1", "name": "a", "data": data, "home": tmp_path / "home", **changes})


def refused(given: Joining) -> FedfuseError:
    with pytest.raises(FedfuseError) as caught:
        join(given, Silent())
    return caught.value


def test_keys_are_asked_for_before_anything_else(tmp_path: Path, data: Path) -> None:
    error = refused(joining(tmp_path, data))
    assert str(error) == (
        "a client joins with the server's ca.pem and a key of its own\n"
        "  where: --ca\n"
        "  fix:   give the two files that fedfuse certs made for it; for a trial without them: --insecure"
    )
    assert refused(joining(tmp_path, data, ca=tmp_path / "ca.pem")).where == "--key"


def test_a_missing_signing_key_is_named(tmp_path: Path, data: Path) -> None:
    make_certificates(tmp_path / "certs", ["a"], ["localhost"])
    keys = tmp_path / "certs" / "a"
    (keys / "a.key.signing").unlink()
    error = refused(joining(tmp_path, data, ca=keys / "ca.pem", key=keys / "a.key"))
    assert error.what == "cannot read the signing key: No such file or directory"
    assert error.where == str(keys / "a.key.signing")


@pytest.mark.parametrize("server", ["nowhere", "host:", ":1", "host:x", "host:0", "host:70000"])
def test_what_is_no_address(tmp_path: Path, data: Path, server: str) -> None:
    error = refused(joining(tmp_path, data, server=server, insecure=True))
    assert error.what == f'"{server}" is no address'


def test_two_processes_of_one_client_are_one_too_many(tmp_path: Path, data: Path) -> None:
    with module._own(tmp_path / "home"):
        error = refused(joining(tmp_path, data, insecure=True))
    assert str(error) == (
        f"another fedfuse join uses this folder\n  where: {tmp_path / 'home'}\n  fix:   stop it, or name another --home"
    )


def test_the_home_has_a_place_of_its_own(data: Path) -> None:
    assert Joining("h:1", "a", data).folder == Path.home() / ".fedfuse" / "a"


def test_events_are_read_once_and_whole(tmp_path: Path) -> None:
    writer = Events(tmp_path)
    writer.add({"event": "old"})
    reader = Events(tmp_path)
    assert reader.new() == []
    writer.add({"event": "working"})
    with writer.path.open("a") as file:
        file.write('not json\n{"event": "ha')
    assert [event["event"] for event in reader.new()] == ["working"]
    with writer.path.open("a") as file:
        file.write('lf"}\n')
    assert [event["event"] for event in reader.new()] == ["half"]
    assert reader.new() == []


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({"event": "enrolled", "num_bytes": 2048}, "enrolled: the server's agreement is here (2 KiB)"),
        ({"event": "working", "exchange": "block_0", "task": "train_block"}, "block_0: computing (train_block)"),
        ({"event": "answered", "exchange": "block_0", "num_bytes": 10}, "block_0: sent, 10 B"),
        ({"event": "refused", "exchange": "moments", "reason": "no"}, "moments: not sent: no"),
        ({"event": "failed", "exchange": "moments", "reason": "why"}, "moments: failed: why"),
        ({"event": "notice", "about": "over", "text": "x"}, ""),
    ],
)
def test_what_the_owner_reads(event: dict[str, Any], words: str) -> None:
    assert in_words(event) == words


@pytest.mark.parametrize(
    ("output", "text", "is_refusal"),
    [
        ("...\nNo SuperNode found with the given public key.", "the server does not know this client's key", True),
        ("x\nInvalid SuperNode authentication", "the server does not know this client's key", True),
        ("one\n\nKilled\n\n", "Flower's SuperNode ended (code 9): Killed", False),
        ("", "Flower's SuperNode ended (code 9): ", False),
        (
            "SSL/TLS handshake error\n[SSL] EOF occurred in violation of protocol",
            "the connection to the server was cut",
            False,
        ),
        ("[SSL: CERTIFICATE_VERIFY_FAILED] ...", "the server's certificate is not trusted", True),
    ],
)
def test_why_a_supernode_ended(output: str, text: str, is_refusal: bool) -> None:
    ending = why_it_ended(output, 9)
    assert (ending.text, ending.is_refusal) == (text, is_refusal)


class FakeChild:
    def __init__(self, output: str) -> None:
        self._output = output

    def output(self) -> str:
        return self._output

    def exit_code(self) -> int:
        return 1


class FakeNode:
    """A SuperNode that dies as often as it is told."""

    has_given_up = False

    def __init__(self, deaths: list[str]) -> None:
        self.deaths, self.num_starts = deaths, 0
        self.child: FakeChild | None = None
        self.is_running = False

    def start(self) -> None:
        self.num_starts += 1
        self.child = FakeChild(self.deaths.pop(0)) if self.deaths else FakeChild("")
        self.is_running = not self.deaths and self.child.output() == ""


class FakeExecutor:
    """Messages that each do something."""

    is_busy = False

    def __init__(self, *messages: Callable[[], None]) -> None:
        self.messages = list(messages)

    def step(self) -> bool:
        if self.messages:
            self.messages.pop(0)()
            return True
        return False


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time that passes only in sleep."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


def watch(tmp_path: Path, data: Path, node: FakeNode, executor: FakeExecutor, **changes: Any) -> tuple[Any, Silent]:
    owner = Silent()
    given = joining(tmp_path, data, **changes)
    given.folder.mkdir(exist_ok=True)
    return module._Watch(given, node, executor, Consent(given.folder), owner), owner  # type: ignore[arg-type]


def notice(tmp_path: Path, about: str, text: str) -> Callable[[], None]:
    return lambda: (
        (tmp_path / "home" / "notice.json").write_text(json.dumps({"about": about, "text": text})),
        None,
    )[1]


@pytest.mark.usefixtures("clock")
def test_it_ends_when_the_server_says_so(tmp_path: Path, data: Path) -> None:
    over = notice(tmp_path, "over", "thank you")
    looked, owner = watch(tmp_path, data, FakeNode([]), FakeExecutor(lambda: None, over))
    assert looked.until_over() == "thank you"
    assert owner.said == ["connecting to 127.0.0.1:1; waiting for the server's questions (Ctrl-C leaves)"]


@pytest.mark.usefixtures("clock")
def test_it_ends_when_it_is_turned_away(tmp_path: Path, data: Path) -> None:
    away = notice(tmp_path, "turned away", 'no client "a" is expected\n  fix:   ask')
    looked, _ = watch(tmp_path, data, FakeNode([]), FakeExecutor(away))
    with pytest.raises(FedfuseError) as caught:
        looked.until_over()
    assert caught.value.what == 'the server turned this client away: no client "a" is expected'
    assert caught.value.fix == "ask"


def test_a_supernode_that_dies_is_started_again_later_and_later(tmp_path: Path, data: Path, clock: list[float]) -> None:
    node = FakeNode(["Killed", "Killed", "Killed"])
    looked, owner = watch(tmp_path, data, node, FakeExecutor())
    began = clock[0]
    while node.num_starts < 4:
        looked._keep_alive()
        time.sleep(0.5)
    assert clock[0] - began == pytest.approx(2 + 4 + 8, abs=3)
    assert owner.said[1:] == [
        f"Flower's SuperNode ended (code 1): Killed; trying again in {pause} s" for pause in (2, 4, 8)
    ]


@pytest.mark.usefixtures("clock")
def test_a_key_that_the_server_does_not_know_ends_it(tmp_path: Path, data: Path) -> None:
    node = FakeNode(["No SuperNode found with the given public key."] * 20)
    looked, owner = watch(tmp_path, data, node, FakeExecutor())
    with pytest.raises(FedfuseError) as caught:
        looked.until_over()
    assert str(caught.value) == (
        "the server does not know this client's key\n"
        "  where: 127.0.0.1:1\n"
        "  fix:   ask its operator to put the key on the list (clients.json); and see that both clocks are right"
    )
    # The operator may only just be writing the list: it is tried for a while, and said once.
    assert node.num_starts == module._NUM_REFUSALS
    assert len(owner.said) == 2


def test_a_server_out_of_reach_for_long_ends_it(
    tmp_path: Path, data: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedfuse.runtimes.flower import processes

    monkeypatch.setattr(processes, "answers", lambda address: clock[0] < 5000)
    looked, _ = watch(tmp_path, data, FakeNode([]), FakeExecutor(), patience_s=3600.0)
    with pytest.raises(FedfuseError) as caught:
        looked.until_over()
    assert caught.value.what == "the server was out of reach for 1.0 hours"
    assert clock[0] == pytest.approx(5000 + 3600, abs=200)


def test_data_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the file's name does not tell how to read it"):
        join(joining(tmp_path, tmp_path / "a.bin", insecure=True), Silent())
