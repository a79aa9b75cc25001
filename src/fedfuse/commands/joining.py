"""``fedfuse join``: one client of a real federation, for as long as the federation lasts."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedfuse.commands.consent import Consent, Owner
from fedfuse.core.cohort import check_client_id
from fedfuse.core.errors import ConfigError, FedfuseError
from fedfuse.core.files import remove_unfinished
from fedfuse.experiment.agreement import Agreement, open_side
from fedfuse.experiment.contributing import default_home, own_data
from fedfuse.report.units import format_bytes

if TYPE_CHECKING:
    from fedfuse.core.sealing import SigningKey
    from fedfuse.runtimes.flower.executing import Executor, SuperNode
    from fedfuse.runtimes.flower.node import Node

_POLL_S = 0.5
_POLL_BUSY_S = 0.1
_LAST_WORDS_S = 2.5
"""For the SuperNode to send the answer that it has when the server says that the federation is over."""

_LONGEST_PAUSE_S = 30.0
_PROBE_EVERY_S = 60.0
_NUM_REFUSALS = 8
"""A node that was killed counts as connected for a minute or two."""


@dataclass(frozen=True)
class Joining:
    """What one client joins with.

    Args:
        server: ``HOST:PORT``.
        name: the client's name in the federation.
        data: file or folder of its examples.
        source: name in the registry of sources; told by the path if left out.
        settings: ``key=value`` of that source.
        ca: certificate that the server's is checked with.
        key: private key of the node; the signing key lies beside it.
        home: what must last is kept here; ``~/.fedfuse/NAME`` if left out.
        refuse: keys or ``group/*`` that must not leave.
        previews: show the owner what would leave, and ask.
        only_sums: let uploads leave only masked, to be added up unseen.
        insecure: no TLS and no node key; for trials.
        device: ``cpu`` or ``cuda``.
        patience_s: most seconds that the server may be out of reach.
    """

    server: str
    name: str
    data: Path
    source: str = ""
    settings: Sequence[str] = ()
    ca: Path | None = None
    key: Path | None = None
    home: Path | None = None
    refuse: Sequence[str] = ()
    previews: bool = False
    only_sums: bool = False
    insecure: bool = False
    device: str = "cpu"
    patience_s: float = 7 * 24 * 3600.0
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", self.home or default_home(self.name))


def join(joining: Joining, owner: Owner) -> str:
    """Take part until the server says that the federation is over.

    Args:
        joining: who joins where with what.
        owner: hears what happens, and decides what may leave.

    Returns:
        The server's last words.

    Raises:
        ConfigError: something that the client brings cannot be used.
        FedfuseError: the server turned the client away, or is out of reach for too long.
    """
    from fedfuse.runtimes.flower.processes import check_flower, sigterm_interrupts, split_address

    check_flower()
    check_client_id(joining.name)
    host, port = split_address(joining.server)
    key = _check_keys(joining)
    dataset = own_data(None, joining.name, joining.data, joining.source, joining.settings)
    owner.say(f"{joining.name}: {len(dataset.train):,} examples, nothing of them leaves this machine")
    with _own(joining.folder), sigterm_interrupts():
        remove_unfinished(joining.folder)
        if not joining.insecure:
            _probe(host, port, joining, owner)
        from fedfuse.runtimes.flower.executing import Executor, SuperNode

        consent = Consent(joining.folder, refuse=joining.refuse, previews=joining.previews)
        node = make_node(joining, key, dataset, consent)
        supernode = SuperNode(
            joining.folder / "flower",
            joining.server,
            None if joining.insecure else joining.ca,
            None if joining.insecure else joining.key,
            joining.name,
        )
        (joining.folder / "notice.json").unlink(missing_ok=True)
        executor = Executor(node, supernode)
        _load_what_training_needs()
        try:
            return _Watch(joining, supernode, executor, consent, owner).until_over()
        finally:
            executor.close()
            supernode.stop()


def make_node(joining: Joining, key: SigningKey, dataset: Any, consent: Consent) -> Node:
    """What the client brings to the federation.

    Args:
        joining: who joins with what.
        key: signs what it says.
        dataset: its examples.
        consent: what may leave.
    """
    from fedfuse.runtimes.flower.node import Node

    events = Events(joining.folder)
    return Node(
        name=joining.name,
        key=key,
        home=joining.folder,
        side=lambda agreement: open_side(
            Agreement.decode(agreement), joining.name, dataset, home=joining.folder, device=joining.device
        ),
        approve=consent.decide,
        tell=events.add,
        only_sums=joining.only_sums,
    )


class Events:
    """What happened at a client, in a file, because each message is answered by a process of its own.

    Args:
        folder: the client's home.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "events.jsonl"
        self._at_byte = self.path.stat().st_size if self.path.exists() else 0

    def add(self, facts: Mapping[str, Any]) -> None:
        """Write a line.

        Args:
            facts: JSON.
        """
        line = json.dumps({**facts, "at": time.time()}, sort_keys=True) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)

    def new(self) -> list[dict[str, Any]]:
        """The lines that were added since the last look."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._at_byte)
            lines = file.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        self._at_byte += len(whole)
        found = []
        for line in whole.splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found


class _Watch:
    """Keeps a SuperNode alive and its messages answered."""

    def __init__(
        self, joining: Joining, supernode: SuperNode, executor: Executor, consent: Consent, owner: Owner
    ) -> None:
        self._joining, self._supernode, self._executor = joining, supernode, executor
        self._consent, self._owner = consent, owner
        self._events = Events(joining.folder)
        self._num_deaths = self._num_refusals = 0
        self._start_at_s = 0.0
        self._seen_s = self._probed_s = time.monotonic()

    def until_over(self) -> str:
        while True:
            self._keep_alive()
            moved = self._executor.step()
            for event in self._events.new():
                self._seen_s, self._num_deaths, self._num_refusals = time.monotonic(), 0, 0
                if line := in_words(event):
                    self._owner.say(line)
            self._consent.ask(self._owner)
            if (words := self._last_words()) is not None:
                return words
            self._check_patience()
            if not moved:
                # A look for the next message costs both sides something, a look at a process does not.
                time.sleep(_POLL_BUSY_S if self._executor.is_busy else _POLL_S)

    def _keep_alive(self) -> None:
        if self._supernode.has_given_up:
            self._supernode.stop()
        if self._supernode.is_running or time.monotonic() < self._start_at_s:
            return
        child = self._supernode.child
        if child is not None:
            reason = why_it_ended(child.output(), child.exit_code())
            self._num_deaths += 1
            if reason.is_refusal:
                self._num_refusals += 1
                if self._num_refusals >= _NUM_REFUSALS:
                    raise FedfuseError(reason.text, where=self._joining.server, fix=reason.fix)
            pause_s = min(_LONGEST_PAUSE_S, 2.0**self._num_deaths)
            # The first refusal is often only the server that has not read its list of keys yet.
            if not reason.is_refusal or self._num_refusals == 2:
                self._owner.say(f"{reason.text}; trying again in {pause_s:g} s")
            self._supernode.child = None
            self._start_at_s = time.monotonic() + pause_s
            return
        self._supernode.start()
        if not self._num_deaths:
            self._owner.say(f"connecting to {self._joining.server}; waiting for the server's questions (Ctrl-C leaves)")

    def _last_words(self) -> str | None:
        try:
            notice = json.loads((self._joining.folder / "notice.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        deadline = time.monotonic() + _LAST_WORDS_S
        while self._executor.is_busy or time.monotonic() < deadline:
            self._executor.step()
            time.sleep(_POLL_BUSY_S)
        if notice.get("about") == "over":
            return str(notice.get("text", ""))
        what, _, fix = str(notice.get("text", "")).partition("\n")
        raise FedfuseError(
            f"the server turned this client away: {what}",
            where=self._joining.server,
            fix=fix.strip().removeprefix("fix:").strip(),
        )

    def _check_patience(self) -> None:
        """A server that nobody reaches for days will not come back."""
        now = time.monotonic()
        if now - self._probed_s < _PROBE_EVERY_S:
            return
        from fedfuse.runtimes.flower.processes import answers

        self._probed_s = now
        if answers(self._joining.server):
            self._seen_s = now
        elif now - self._seen_s > self._joining.patience_s:
            raise FedfuseError(
                f"the server was out of reach for {(now - self._seen_s) / 3600:.1f} hours",
                where=self._joining.server,
                fix="ask its operator, then run the same command again: what was computed is kept",
            )


@dataclass(frozen=True)
class Ending:
    """Why a SuperNode ended.

    Args:
        text: a sentence without a full stop.
        fix: what mends it; empty where waiting does.
        is_refusal: whether the server said no.
    """

    text: str
    fix: str = ""
    is_refusal: bool = False


def why_it_ended(output: str, code: int | None) -> Ending:
    """What a SuperNode's last words mean.

    Args:
        output: what it printed.
        code: its exit code.
    """
    if "No SuperNode found" in output or "Invalid SuperNode authentication" in output:
        return Ending(
            "the server does not know this client's key",
            "ask its operator to put the key on the list (clients.json); and see that both clocks are right",
            is_refusal=True,
        )
    if "FLEET_NODE_ACTIVATION_FAILED" in output or "activat" in output.lower():
        return Ending(
            "the server still counts an earlier connection of this client, or does not know its key",
            "see that no other machine joins with this key, and ask the operator whether it is on the list",
            is_refusal=True,
        )
    if "EOF occurred in violation of protocol" in output and "CERTIFICATE_VERIFY_FAILED" not in output:
        return Ending("the connection to the server was cut")
    if "certificate" in output.lower():
        return Ending("the server's certificate is not trusted", "ask the operator for its ca.pem", is_refusal=True)
    last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "")
    return Ending(f"Flower's SuperNode ended (code {code}): {last[:200]}")


def in_words(event: Mapping[str, Any]) -> str:
    """A line for the client's owner.

    Args:
        event: as the node tells it.
    """
    exchange = event.get("exchange", "")
    kind = event.get("event")
    if kind == "enrolled":
        return f"enrolled: the server's agreement is here ({format_bytes(event['num_bytes'])})"
    if kind == "working":
        return f"{exchange}: computing ({event['task']})"
    if kind == "answered":
        return f"{exchange}: sent, {format_bytes(event['num_bytes'])}"
    if kind == "refused":
        return f"{exchange}: not sent: {event['reason']}"
    if kind == "failed":
        return f"{exchange}: failed: {event['reason']}"
    return ""


def _check_keys(joining: Joining) -> SigningKey:
    from fedfuse.core.sealing import SigningKey

    if joining.insecure:
        return SigningKey.load_or_make(joining.folder / "key.pem")
    if joining.ca is None or joining.key is None:
        raise ConfigError(
            "a client joins with the server's ca.pem and a key of its own",
            where="--ca" if joining.ca is None else "--key",
            fix="give the two files that fedfuse certs made for it; for a trial without them: --insecure",
        )
    from fedfuse.runtimes.flower.trust import SIGNING_SUFFIX, check_client_files

    check_client_files(joining.ca, joining.key)
    return SigningKey.load(joining.key.with_name(joining.key.name + SIGNING_SUFFIX))


def _load_what_training_needs() -> None:
    """Torch loads 700 modules at an optimiser's first step; done here, not in the process of every message."""
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    torch.optim.SGD([weight], lr=0.0).step()


def _probe(host: str, port: int, joining: Joining, owner: Owner) -> None:
    from fedfuse.runtimes.flower.trust import probe_server

    assert joining.ca is not None
    if reason := probe_server(host, port, joining.ca):
        owner.say(f"{reason}; it will be tried again until it does")


@contextmanager
def _own(folder: Path) -> Iterator[None]:
    """Keep other processes of the same client out."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"cannot use the client's folder: {error.strerror}", where=str(folder), fix="name another --home"
        ) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                "another fedfuse join uses this folder", where=str(folder), fix="stop it, or name another --home"
            ) from None
        yield
    finally:
        os.close(lock)
