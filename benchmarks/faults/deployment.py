"""Faults of a real deployment: one SuperLink and its SuperNodes over TLS on the loopback address."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from federation import (
    FUSEFL,
    Command,
    changed,
    descendants,
    digest,
    gone_at_the_end,
    is_running,
    replies,
    run,
    start,
    undisturbed,
    wait_until,
    write,
)
from outcome import SAME, Seen, check, fault, said
from proxy import BadNetwork

FAMILY = "real deployment over TLS"
NAMES = ["client_0", "client_1", "client_2"]
CONFIG = changed(
    FUSEFL,
    {
        "data.partition.num_clients": len(NAMES),
        "data.limit": 240,
        "method.local.num_epochs": 4,
        "runtime.workers": 1,
        "federation": {},
    },
)
PATIENCE_S = 420.0
"""For any one step, on a busy machine."""


class Deployment:
    """A server and clients as commands, each of which can be killed and started again.

    Args:
        home: for everything.
        config: of the simulation that it must equal.
    """

    def __init__(self, home: Path, config: Mapping[str, Any] = CONFIG) -> None:
        from fedfuse.runtimes.flower.processes import free_port

        self.home, self.out, self.port = home, home / "run", free_port()
        path = write(home / "c.yaml", config)
        code, text = run("split", path, "--out", home / "parts")
        check(code == 0, text[-500:])
        code, text = run("certs", home / "certs", "--clients", ",".join(NAMES), "--host", "localhost")
        check(code == 0, text[-500:])
        self.commands: list[Command] = []
        self.server: Command | None = None
        self.clients: dict[str, Command] = {}

    def serve(self, *more: str) -> Command:
        """Start the server, or start it again.

        Args:
            more: options.
        """
        config, address = self.home / "parts" / "federation.yaml", f"127.0.0.1:{self.port}"
        certs = self.home / "certs"
        self.server = start("serve", config, "--address", address, "--certs", certs, "--out", self.out, *more)
        self.commands.append(self.server)
        return self.server

    def join(self, name: str, *, port: int | None = None, **changes: Path | str) -> Command:
        """Start a client, or start it again.

        Args:
            name: the client's.
            port: to connect to; the server's if left out.
            changes: of the options.
        """
        keys = self.home / "certs" / name
        options = {"ca": keys / "ca.pem", "key": keys / f"{name}.key", "name": name, **changes}
        command = start(
            *("join", "--server", f"localhost:{port or self.port}", "--data", self.home / "parts" / f"{name}.npz"),
            *("--home", self.home / "homes" / str(options["name"])),
            *(part for key, value in options.items() for part in (f"--{key}", value)),
        )
        self.clients[name] = command
        self.commands.append(command)
        return command

    def arrived(self, num: int) -> None:
        """Wait for answers.

        Args:
            num: in the journal.
        """

        def is_decided() -> bool:
            return len(replies(self.out)) >= num or any(c.poll() for c in self.clients.values())

        there = wait_until(is_decided, limit_s=PATIENCE_S, every_s=0.05) and len(replies(self.out)) >= num
        check(there, f"{len(replies(self.out))} of {num} answers came; {self.words()}")

    def words(self) -> str:
        """The last that everybody said."""
        texts = [*([] if self.server is None else [self.server.text()]), *(c.text() for c in self.clients.values())]
        return " // ".join(" ".join(text.split())[-300:] for text in texts)

    def ended(self) -> None:
        """Wait for the end of everybody."""
        assert self.server is not None
        code, text = self.server.finish(PATIENCE_S)
        check(code == 0, text[-800:])
        for name, client in self.clients.items():
            code, text = client.finish(60)
            check(code == 0, f"{name}: {text[-500:]}")


def slain(command: Command) -> None:
    """Kill a command alone, and demand that nothing that it started lives on.

    Args:
        command: to be killed with signal 9.
    """
    children = descendants(command.pid)
    command.kill()
    command.finish()
    check(wait_until(lambda: not any(map(is_running, children)), limit_s=20), "what it started lives on")


@fault(FAMILY, "kill -9 of server, client, both, SuperLink, SuperNode: one in every exchange")
def killed_in_turn(home: Path) -> Seen:
    """FuseFL with four blocks; in each of its exchanges something else is killed, and started again."""
    wanted = undisturbed(CONFIG, home)
    deployed, total = Deployment(home), len(NAMES)
    with gone_at_the_end(deployed.commands):
        server = deployed.serve()
        for name in NAMES:
            deployed.join(name)
        seen: set[str] = set()

        def next_exchange(number: int) -> None:
            nonlocal seen
            deployed.arrived(number * total + 1)
            check(seen <= replies(deployed.out), "an accepted reply is lost")
            seen = replies(deployed.out)

        next_exchange(0)
        slain(server)
        server = deployed.serve()
        next_exchange(1)
        slain(deployed.clients[NAMES[0]])
        deployed.join(NAMES[0])
        next_exchange(2)
        slain(server)
        slain(deployed.clients[NAMES[1]])
        server = deployed.serve()
        deployed.join(NAMES[1])
        next_exchange(3)
        victims = [child for child in descendants(server.pid) if "superlink" in _program(child)]
        check(victims, "there is no SuperLink")
        os.kill(victims[0], 9)
        next_exchange(4)
        victims = [c for c in descendants(deployed.clients[NAMES[2]].pid) if "supernode" in _program(c)]
        for victim in victims:
            os.kill(victim, 9)
        deployed.ended()
        check(seen <= replies(deployed.out), "an accepted reply is lost")
        check(digest(deployed.out) == wanted, "another digest")
        entries = json.loads((deployed.out / "ledger.json").read_text(encoding="utf-8"))["entries"]
        check(len(entries) == 5 * total, f"{len(entries)} answers")
    return Seen(
        "after each kill the same command, or its own restart, went on; nothing that was killed left a process", SAME
    )


def _program(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


@fault(FAMILY, "network slow, cut again and again, and dark for 20 s")
def bad_network(home: Path) -> Seen:
    """Every client behind a network that delays by 50 ms, carries 200 kB/s and breaks connections at any byte."""
    wanted = undisturbed(CONFIG, home)
    deployed = Deployment(home)
    network = BadNetwork(deployed.port, delay_s=0.05, bytes_per_s=2e5, cut_every_bytes=60_000)
    try:
        with gone_at_the_end(deployed.commands):
            deployed.serve()
            for name in NAMES:
                deployed.join(name, port=network.port)
            deployed.arrived(2)
            network.is_dark = True
            time.sleep(20)
            network.is_dark = False
            deployed.ended()
            check(digest(deployed.out) == wanted, "another digest")
    finally:
        network.close()
    facts = json.loads((deployed.out / "result.json").read_text(encoding="utf-8"))
    check(not facts["missing"], f"missing: {facts['missing']}")
    happened = f"{network.num_connections} connections, {network.num_cuts} of them cut, {network.num_bytes:,} bytes"
    return Seen(f"{happened}; nobody was missing", SAME)


@fault(FAMILY, "certificate wrong, expired, missing; key unknown; name not on the list")
def wrong_papers(home: Path) -> Seen:
    """Clients and servers with wrong papers; then the right ones join the same server."""
    wanted = undisturbed(CONFIG, home)
    deployed = Deployment(home)
    told = []

    def refused(*arguments: str | Path, words: tuple[str, ...]) -> None:
        code, text = run(*arguments, timeout_s=PATIENCE_S)
        check(code == 2, f"exit code {code}: {text[-400:]}")
        message = said(text, *words)
        told.append(message[len("error: ") : message.find(" where:")] if " where:" in message else message[:120])

    other = home / "other"
    code, text = run("certs", other, "--clients", "mallory", "--host", "localhost")
    check(code == 0, text[-300:])
    old = home / "old"
    _expired(old)
    config = home / "parts" / "federation.yaml"
    address = f"127.0.0.1:{deployed.port}"
    server = ("serve", config, "--address", address, "--out", home / "refused")
    refused(*server, "--certs", home / "nowhere", words=("make it with fedfuse certs",))
    refused(*server, "--certs", old, words=("expired",))
    keys, parts = home / "certs" / NAMES[0], home / "parts"
    with gone_at_the_end(deployed.commands):
        deployed.serve()
        check(wait_until(lambda: _listens(deployed.port), limit_s=PATIENCE_S), deployed.words())
        client = ("join", "--server", f"localhost:{deployed.port}", "--data", parts / f"{NAMES[0]}.npz")
        me = ("--name", NAMES[0], "--home", home / "try")
        key, ca = ("--key", keys / f"{NAMES[0]}.key"), ("--ca", keys / "ca.pem")
        refused(*client, *me, *key, "--ca", other / "mallory" / "ca.pem", words=("certificate",))
        refused(*client, *me, *key, "--ca", home / "no.pem", words=("no.pem",))
        refused(*client, *me, *key, words=("--ca",))
        refused(*client, *me, *ca, "--key", other / "mallory" / "mallory.key", words=("key",))
        shutil.copytree(other / "mallory", home / "m")
        unlisted = ("--name", "mallory", "--home", home / "try_m", "--key", home / "m" / "mallory.key")
        refused(*client, *unlisted, *ca, words=("key",))
        # A listed client's own key under the name of another one.
        refused(*client, "--name", NAMES[1], "--home", home / "try_o", *ca, *key, words=(NAMES[1],))
        check(not replies(deployed.out), "something was accepted")
        for name in NAMES:
            deployed.join(name)
        deployed.ended()
        check(digest(deployed.out) == wanted, "another digest")
    return Seen(
        f"{len(told)} refusals, each with its own message; those with the right papers then ended the run",
        SAME,
        "; ".join(dict.fromkeys(told)),
    )


def _expired(folder: Path) -> None:
    from fedfuse.runtimes.flower.certificates import make_certificates

    make_certificates(folder, NAMES, ["localhost"], valid_days=-1)


def _listens(port: int) -> bool:
    done = subprocess.run(["bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{port}"], capture_output=True, check=False)
    return done.returncode == 0
