"""``fedfuse serve`` over nodes in this process: who is expected, what a late client changes, what an operator reads."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

import httpx
from rich.console import Console

import fedfuse
from fedfuse.commands import serving as module
from fedfuse.commands.consent import Consent
from fedfuse.commands.joining import Joining, make_node
from fedfuse.commands.serving import Federation, enrolled, prepare, read_clients, read_duration
from fedfuse.commands.serving_screen import ServingLive
from fedfuse.commands.splitting import split
from fedfuse.core.errors import ConfigError
from fedfuse.core.sealing import SigningKey
from fedfuse.experiment import Config, read_config
from fedfuse.experiment.contributing import own_data
from fedfuse.runtimes.flower.certificates import make_certificates
from fedfuse.runtimes.flower.hosting import ServerLost, SuperLink, as_lost
from flower_double import DoubleGrid, apps_of

NAMES = ["client_0", "client_1", "client_2"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL_S", 0.01)


def simulation(method: str = "fedavg") -> dict[str, Any]:
    return {
        "seed": 1,
        "data": {
            "source": "digits",
            "limit": 90,
            "test_limit": 30,
            "partition": {"scheme": "iid", "num_clients": 3},
        },
        "model": {"family": "mlp"},
        "method": {"name": method, **({"local": {"num_epochs": 1}} if method == "fedavg" else {})},
        "runtime": {"name": "local", "workers": 1},
        "server": {"threads": 1},
    }


class Remote:
    """A real federation's files, and its three clients as nodes of this process."""

    def __init__(self, folder: Path, table: dict[str, Any]) -> None:
        self.folder = folder
        split(read_config(table), folder / "data")
        nodes = []
        for name in NAMES:
            joining = Joining("", name, folder / "data" / f"{name}.npz", home=folder / "homes" / name)
            key = SigningKey.load_or_make(joining.folder / "key.pem")
            nodes.append(make_node(joining, key, own_data(None, name, joining.data), Consent(joining.folder)))
        self.apps = apps_of(nodes)
        self.grid = DoubleGrid(self.apps)
        self.log = io.StringIO()
        self.live = ServingLive(folder / "run", Console(file=self.log, width=160))

    def config(self, *overrides: str) -> Config:
        return read_config(self.folder / "data" / "federation.yaml", overrides)

    def fuse(self, *overrides: str) -> fedfuse.Result:
        federation = Federation.of(self.config(*overrides), self.folder / "run", None)
        return federation.fuse(self.grid, self.live)


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    return Remote(tmp_path, simulation())


@pytest.fixture
def additive(tmp_path: Path) -> Remote:
    """The same clients under a method that takes late ones in."""
    return Remote(tmp_path, simulation("afl"))


def digest(result: fedfuse.Result) -> str:
    assert result.artifact is not None
    return result.artifact.digest()


def test_the_model_is_the_simulation_s_and_everybody_hears_that_it_is_over(remote: Remote) -> None:
    result = remote.fuse()
    assert digest(result) == digest(fedfuse.run(simulation()))
    assert result.missing == {}
    notices = [json.loads((remote.folder / "homes" / name / "notice.json").read_text()) for name in NAMES]
    assert {notice["about"] for notice in notices} == {"over"}
    assert "client_0 is here" in remote.log.getvalue()
    assert "local_models: client_2 is done" in remote.log.getvalue()


def test_a_client_that_answers_late_is_fused_in(additive: Remote) -> None:
    nodes = dict(zip(NAMES, additive.apps, strict=True))
    thaw = threading.Timer(0.8, lambda: additive.grid.frozen.clear())

    def freeze(question: Any, reply: Any) -> None:
        # It enrols, is asked, and its answer takes longer than the deadline.
        if question.metadata.dst_node_id == nodes["client_1"] and not thaw.ident:
            additive.grid.frozen.add(nodes["client_1"])
            thaw.start()

    additive.grid.faults.append(freeze)
    result = additive.fuse("federation.timeout_s=0.4", "federation.quorum=0.5")
    thaw.join()
    assert digest(result) == digest(fedfuse.run(simulation("afl")))
    assert result.missing == {}
    said = additive.log.getvalue()
    assert "note: fused without client_1; waiting for them, and fusing again with each that comes" in said
    assert "note: fusing again with client_1" in said


def test_a_client_that_joins_late_is_fused_in(additive: Remote) -> None:
    last = list(additive.apps)[2]
    app = additive.grid.apps.pop(last)
    come = threading.Timer(0.8, lambda: additive.grid.apps.setdefault(last, app))
    come.start()
    result = additive.fuse("federation.timeout_s=0.4", "federation.quorum=0.5")
    come.join()
    assert digest(result) == digest(fedfuse.run(simulation("afl")))
    assert sorted(enrolled(additive.folder / "run" / "flower" / "members.json")) == NAMES


def test_who_does_not_come_is_waited_for_no_longer_than_the_deadline(additive: Remote) -> None:
    additive.grid.apps.popitem()
    result = additive.fuse("federation.timeout_s=0.2", "federation.quorum=0.5")
    assert sorted(result.clients) == NAMES[:2]
    assert "note: client_2 did not come" in additive.log.getvalue()


def test_late_answers_are_only_recorded_where_the_operator_says_so(remote: Remote) -> None:
    remote.grid.apps.popitem()
    remote.fuse("federation.timeout_s=0.2", "federation.quorum=0.5", "federation.late=record")
    assert "note: without client_2: what came late is kept in the journal and changes nothing" in remote.log.getvalue()


def test_the_same_command_continues_from_the_journal(remote: Remote) -> None:
    first = remote.fuse()
    questions = [message for message in remote.grid.sent if message.metadata.message_type == "train.task"]
    assert len(questions) == 3
    assert digest(remote.fuse()) == digest(first)
    assert [m for m in remote.grid.sent if m.metadata.message_type == "train.task"] == questions


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("1.5m", 90), ("12h", 43200), ("2d", 172800), ("7", 7), (" 3s ", 3)]
)
def test_durations(text: str, seconds: float) -> None:
    assert read_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "2w", "-3s", "1d2h", "soon", "0h"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_duration(text)
    assert str(caught.value) == (
        f'"{text}" is no duration\n  where: --deadline\n  fix:   write it like 90s, 30m, 12h or 2d'
    )


def test_the_command_line_overrides_the_configuration(tmp_path: Path) -> None:
    serving = prepare(
        {**simulation(), "federation": {"clients": ["a"]}},
        ["seed=9"],
        address="[::1]:9092",
        certs=None,
        out=tmp_path,
        quorum=0.25,
        deadline="1h",
        insecure=True,
    )
    assert (serving.host, serving.port, serving.config.seed) == ("::1", 9092, 9)
    assert (serving.config.federation.quorum, serving.config.federation.timeout_s) == (0.25, 3600)


@pytest.mark.parametrize(
    ("insecure", "certs", "message"),
    [
        (False, None, "there are no certificates"),
        (True, Path("certs"), "a federation has certificates or is insecure, not both"),
    ],
)
def test_insecure_must_be_said(tmp_path: Path, insecure: bool, certs: Path | None, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(simulation(), address="0.0.0.0:1", certs=certs, out=tmp_path, insecure=insecure)
    assert caught.value.what == message


def config_of(clients: dict[str, str]) -> Config:
    return read_config({**simulation(), "federation": {"clients": clients}})


def test_keys_come_from_the_list(tmp_path: Path) -> None:
    make_certificates(tmp_path, ["a", "b"], ["localhost"])
    keys = {name: SigningKey.load(tmp_path / name / f"{name}.key.signing").public_key for name in ("a", "b")}
    trusted, node_keys = read_clients(config_of({}), tmp_path)
    assert trusted == keys
    assert sorted(node_keys) == ["a", "b"]
    assert all(key.startswith(b"-----BEGIN PUBLIC KEY-----") for key in node_keys.values())
    # The configuration may say fewer, and may repeat a key.
    assert read_clients(config_of({"b": keys["b"].upper()}), tmp_path)[0] == {"b": keys["b"]}


def test_clients_without_a_key_are_no_clients(tmp_path: Path) -> None:
    make_certificates(tmp_path, ["a"], ["localhost"])
    with pytest.raises(ConfigError) as caught:
        read_clients(config_of({"c": ""}), tmp_path)
    assert str(caught.value) == (
        'there is no key of "c" on the list\n'
        f"  where: {tmp_path / 'clients.json'}\n"
        f"  fix:   fedfuse certs {tmp_path} --clients c, or leave the name out of federation.clients"
    )
    with pytest.raises(ConfigError, match='"a" has one signing key in the configuration and another on the list'):
        read_clients(config_of({"a": "00" * 32}), tmp_path)
    with pytest.raises(ConfigError, match="nothing says who takes part"):
        read_clients(config_of({}), None)


def test_losing_the_superlink_is_told_from_other_errors(tmp_path: Path) -> None:
    superlink = SuperLink(tmp_path, "127.0.0.1", 1, None)
    lost = ServerLost("gone")
    assert as_lost(ValueError("x"), superlink) is None
    assert as_lost(lost, superlink) is lost
    try:
        try:
            raise httpx.ConnectError("refused")
        except httpx.ConnectError as error:
            raise RuntimeError("pull failed") from error
    except RuntimeError as error:
        found = as_lost(error, superlink)
    assert found is not None
    assert found.what == "the SuperLink runs but does not answer: ConnectError: refused"
    assert found.fix == "run the same command again: what was received is in the journal"


def test_what_the_operator_hears(tmp_path: Path) -> None:
    log = io.StringIO()
    live = ServingLive(tmp_path, Console(file=log, width=100))
    live.heard({"event": "enrolled", "client": "a"})
    live.heard({"event": "turned away", "node": 7, "reason": 'no client "x" is expected\n  fix: ...'})
    live.heard({"event": "ignored reply", "client": "a"})
    assert log.getvalue() == 'a is here\nnode 7: turned away: no client "x" is expected\n'


def test_the_screen_shows_a_line_for_each_client(remote: Remote) -> None:
    remote.fuse()
    console = Console(file=io.StringIO(), width=160)
    console.print(ServingLive(remote.folder / "run", console).picture())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(name in text for name in NAMES)
