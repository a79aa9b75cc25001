"""``fedfuse serve``: the server of a real federation, from the first enrolment to the artifact."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedfuse.commands.serving_screen import ServingLive
from fedfuse.commands.status import MEMBERS_FILE
from fedfuse.core.client import Reply, Request
from fedfuse.core.cohort import ClientFacts, Runtime, check_client_id
from fedfuse.core.errors import ConfigError
from fedfuse.core.method import Method
from fedfuse.core.registry import METHODS
from fedfuse.core.sealing import check_public_key
from fedfuse.experiment import Config, Result, is_additive_run, read_config, resolve
from fedfuse.experiment.agreement import Agreement
from fedfuse.experiment.configuration import ConfigLike, named
from fedfuse.experiment.running import run_method
from fedfuse.experiment.setting import Loader, Setting

if TYPE_CHECKING:
    from fedfuse.runtimes.flower.apps import Grid
    from fedfuse.runtimes.flower.grid import GridRuntime

_POLL_S = 0.5
_NUM_QUICK_LOSSES = 5
_QUICK_S = 60.0
_OVER = "the federation is over: the model is fused; thank you"


@dataclass(frozen=True)
class Serving:
    """One federation to serve.

    Args:
        config: its configuration.
        folder: the run's folder.
        host: the address to listen on.
        port: its port.
        certs: what ``fedfuse certs`` made; ``None`` is without TLS and without keys.
    """

    config: Config
    folder: Path
    host: str
    port: int
    certs: Path | None


def read_duration(text: str) -> float:
    """Seconds of ``90s``, ``30m``, ``12h`` or ``2d``.

    Args:
        text: a number alone is seconds.

    Raises:
        ConfigError: it is no duration.

    Example:
        >>> read_duration("2d")
        172800.0
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if match is None or not float(match[1]):
        raise ConfigError(f'"{text}" is no duration', where="--deadline", fix="write it like 90s, 30m, 12h or 2d")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def prepare(
    config: ConfigLike,
    overrides: Sequence[str] = (),
    *,
    address: str,
    certs: Path | None,
    out: Path,
    quorum: float | None = None,
    deadline: str = "",
    insecure: bool = False,
) -> Serving:
    """Read what the command line says.

    Args:
        config: a YAML file or a configuration.
        overrides: ``section.key=value``.
        address: ``HOST:PORT`` to listen on.
        certs: what ``fedfuse certs`` made.
        out: the run's folder.
        quorum: instead of the configuration's.
        deadline: of each exchange, instead of the configuration's.
        insecure: no TLS and no keys.

    Raises:
        ConfigError: something of it cannot be used.
    """
    from fedfuse.runtimes.flower.processes import split_address

    if insecure != (certs is None):
        raise ConfigError(
            "a federation has certificates or is insecure, not both" if insecure else "there are no certificates",
            where="--certs",
            fix="leave one of the two out"
            if insecure
            else "fedfuse certs DIR --clients NAME,NAME --host HOST makes some",
        )
    more = [] if quorum is None else [f"federation.quorum={quorum}"]
    more += [f"federation.timeout_s={read_duration(deadline)}"] if deadline else []
    host, port = split_address(address)
    return Serving(read_config(config, [*overrides, *more]), out, host, port, certs)


def serve(serving: Serving, live: ServingLive) -> Result:
    """Serve a federation until its artifact is there; called again after anything at all, it continues.

    Args:
        serving: what to serve.
        live: hears how far it is.

    Returns:
        The result.

    Raises:
        ConfigError: configuration, certificates or list of clients cannot be used.
        FedfuseError: the SuperLink cannot be kept running, or too few clients answered.
    """
    from fedfuse.runtimes.flower.processes import check_flower, sigterm_interrupts

    check_flower()
    from fedfuse.runtimes.flower.hosting import HostedRun, SuperLink, as_lost
    from fedfuse.runtimes.flower.trust import check_server_files

    federation = Federation.of(serving.config, serving.folder, serving.certs)
    files = None if serving.certs is None else check_server_files(serving.certs)
    superlink = SuperLink(serving.folder / "flower", serving.host, serving.port, files)
    losses: list[float] = []
    with sigterm_interrupts(), ExitStack() as stack:
        stack.callback(superlink.stop)
        while True:
            try:
                if not superlink.is_running:
                    superlink.start()
                    live.note(f"clients join at {serving.host}:{serving.port}")
                if files is not None:
                    superlink.allow_only(federation.node_keys)
                with HostedRun(superlink) as run:
                    return federation.fuse(run.grid, live)
            except Exception as error:
                lost = as_lost(error, superlink)
                if lost is None:
                    raise
                losses = [*[at for at in losses if time.monotonic() - at < _QUICK_S], time.monotonic()]
                if len(losses) > _NUM_QUICK_LOSSES:
                    raise lost from None
                live.note(f"{lost.what}; starting it again, nothing that came is lost")
                superlink.stop()


@dataclass(frozen=True)
class Federation:
    """What a server needs to carry out a method over a Flower grid, however the grid came about.

    Args:
        config: the configuration.
        folder: the run's folder.
        setting: the federation as its server sees it.
        agreement: what every client is told.
        expected: who may take part.
        trusted: name to public signing key; empty trusts the first one that comes under the name.
        node_keys: name to public key of the client's SuperNode.
    """

    config: Config
    folder: Path
    setting: Setting
    agreement: bytes
    expected: Sequence[str]
    trusted: Mapping[str, str]
    node_keys: Mapping[str, bytes]

    @classmethod
    def of(cls, config: Config, folder: Path, certs: Path | None) -> Federation:
        """Read what a configuration and its list of clients say.

        Args:
            config: the configuration.
            folder: the run's folder.
            certs: what ``fedfuse certs`` made, or nothing.

        Raises:
            ConfigError: nobody is expected, or a client has no key.
        """
        trusted, node_keys = read_clients(config, certs)
        setting = Loader(config).setting(config.seed).without_clients()
        agreement = Agreement.of(config, setting).encode()
        return cls(config, folder, setting, agreement, sorted(trusted), trusted, node_keys)

    def fuse(self, grid: Grid, live: ServingLive) -> Result:
        """Carry out the method, and again for clients that come late where the method can take them in.

        Args:
            grid: Flower's.
            live: hears how far it is.
        """
        from fedfuse.runtimes.flower.grid import GridRuntime

        terms = self.config.federation
        runtime = GridRuntime(
            grid,
            agreement=self.agreement,
            expected=self.expected,
            trusted=self.trusted,
            quorum=terms.quorum,
            deadline_s=terms.timeout_s,
            members=self.folder / MEMBERS_FILE,
            codec=terms.codec,
            max_upload_bytes=terms.max_upload_bytes,
            poll_s=_POLL_S,
            log=live.heard,
        )
        try:
            result = self._run(runtime, live)
            # A second sum with one client more would show that client's numbers.
            if terms.late == "merge" and is_additive_run(result.facts) and terms.secure_aggregation is None:
                result = self._with_late(runtime, result, live)
            elif late := self._absent(result):
                live.note(f"without {', '.join(late)}: what came late is kept in the journal and changes nothing")
            runtime.dismiss(_OVER)
            return result
        finally:
            runtime.close()

    @property
    def method(self) -> Method:
        """The method that the configuration names."""
        found: Method = named(METHODS, self.config.method.name, self.config.method.others, "method")
        return found

    def _run(self, runtime: Runtime, live: ServingLive) -> Result:
        config = self.config
        return run_method(
            self.setting,
            self.method,
            config,
            resolve(config),
            label=config.method.name,
            folder=self.folder,
            observer=live,
            runtime=runtime,
        )

    def _absent(self, result: Result) -> list[str]:
        """Who is expected and whose answers are not in a result."""
        return sorted({*self.expected} - {*result.clients} | {*result.missing})

    def _with_late(self, runtime: GridRuntime, result: Result, live: ServingLive) -> Result:
        """Wait once more as long for those who are missing, and fuse again with each that comes."""
        limit_s = self.config.federation.timeout_s
        start = time.monotonic()
        asked = set(result.clients)
        while absent := self._absent(result):
            if limit_s is not None and time.monotonic() - start >= limit_s:
                live.note(f"{', '.join(absent)} did not come")
                break
            if time.monotonic() - start < _POLL_S:
                live.note(f"fused without {', '.join(absent)}; waiting for them, and fusing again with each that comes")
            time.sleep(_POLL_S)
            replies = {reply.answer_key: reply for reply in runtime.late_replies() if reply.upload is not None}
            facts = enrolled(self.folder / MEMBERS_FILE)
            fresh = set(facts) - asked
            if replies or fresh:
                live.note(f"fusing again with {', '.join(sorted({r.client_id for r in replies.values()} | fresh))}")
                result = self._run(_Late(runtime, facts, fresh, replies), live)
                asked |= fresh
        return result


class _Late:
    """A runtime that asks only clients that were never asked, and hands out what has come from the others.

    Args:
        inner: asks.
        facts: all clients that have enrolled.
        fresh: those that were never asked.
        replies: answer key to what came late.
    """

    def __init__(
        self, inner: GridRuntime, facts: Mapping[str, ClientFacts], fresh: set[str], replies: Mapping[str, Reply]
    ) -> None:
        self._inner, self._facts, self._fresh, self._replies = inner, facts, fresh, replies

    def clients(self) -> Mapping[str, ClientFacts]:
        return self._facts

    def exchange(
        self, requests: Sequence[Request], *, timeout_s: float | None, progress: Callable[[str, int, int], None]
    ) -> Iterator[Reply]:
        asked = []
        for request in requests:
            if request.answer_key in self._replies:
                yield self._replies[request.answer_key]
            elif request.client_id in self._fresh:
                asked.append(request)
            else:
                yield Reply(request.client_id, error="it has not answered yet", answer_key=request.answer_key)
        if asked:
            yield from self._inner.exchange(asked, timeout_s=timeout_s, progress=progress)

    def close(self) -> None:
        pass


def enrolled(path: Path) -> dict[str, ClientFacts]:
    """The clients that have enrolled so far, and what questions to them are made from.

    Args:
        path: where the server's runtime remembers them.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): ClientFacts(**row["facts"]) for name, row in sorted(table["clients"].items())}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def read_clients(config: Config, certs: Path | None) -> tuple[dict[str, str], dict[str, bytes]]:
    """Who may take part, from the configuration and the list that ``fedfuse certs`` made.

    Args:
        config: names, and signing keys where they are known.
        certs: the folder with the list; ``None`` is a trial without keys.

    Returns:
        Name to signing key, which may be empty, and name to the node's key.

    Raises:
        ConfigError: nobody is expected, a client has no key, or two keys.
    """
    named_here = {check_client_id(name): key.lower() for name, key in config.federation.clients.items()}
    for name, key in named_here.items():
        if key:
            check_public_key(key, f"federation.clients.{name}")
    if certs is None:
        if not named_here:
            raise ConfigError(
                "nothing says who takes part", where="federation.clients", fix="write the clients' names there"
            )
        return named_here, {}
    from fedfuse.runtimes.flower.trust import node_key_bytes, read_members

    listed = read_members(certs)
    where = str(certs / "clients.json")
    if not (named_here or listed):
        raise ConfigError("nothing says who takes part", where=where, fix=f"fedfuse certs {certs} --clients NAME,NAME")
    trusted, node_keys = {}, {}
    for name in named_here or listed:
        if name not in listed:
            raise ConfigError(
                f'there is no key of "{name}" on the list',
                where=where,
                fix=f"fedfuse certs {certs} --clients {name}, or leave the name out of federation.clients",
            )
        member = listed[name]
        trusted[name] = named_here.get(name) or member.signing_key
        if trusted[name] != member.signing_key:
            raise ConfigError(
                f'"{name}" has one signing key in the configuration and another on the list',
                where=f"federation.clients.{name}",
                fix=f"leave it empty there, or mend {where}",
            )
        node_keys[name] = node_key_bytes(member.node_key, f"{where}: {name}")
    return trusted, node_keys
