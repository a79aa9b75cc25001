"""The server's part of a federation by hand: fuse what lies in a folder, say who is missing, write the next request."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedfuse.core.errors import ConfigError, FedfuseError, QuorumError
from fedfuse.core.files import write_atomically
from fedfuse.core.registry import METHODS
from fedfuse.core.sealing import SigningKey, check_public_key
from fedfuse.core.storage import list_files
from fedfuse.experiment.agreement import Agreement
from fedfuse.experiment.configuration import Config, named, resolve
from fedfuse.experiment.result import Observer, Result
from fedfuse.experiment.running import run_method
from fedfuse.experiment.setting import Loader
from fedfuse.runtimes.files import SUFFIX, Contribution, FilesRuntime, seal_requests
from fedfuse.runtimes.members import Member, Members

UNASKED = "it answers another configuration, seed, version of fedfuse or earlier data"


@dataclass(frozen=True)
class InboxResult:
    """How far a federation by hand is.

    Args:
        result: of the run; ``None`` while it waits for contributions.
        contributed: client id to the places of what it sent that can be used.
        missing: client id to why its answer is not there.
        refused: place to the reason why the file there was not used.
        unasked: places of contributions that answer no question of this run.
        request: the file that the missing clients answer; ``None`` where they answer the configuration.
        exchange: key of the exchange that is waited for.
        reason: why the run cannot go on.
    """

    result: Result | None
    contributed: Mapping[str, Sequence[str]]
    missing: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    unasked: Sequence[str] = ()
    request: Path | None = None
    exchange: str = ""
    reason: str = ""


def fuse_inbox(inboxes: Sequence[str], config: Config, out: Path, *, observer: Observer | None = None) -> InboxResult:
    """Fuse the contributions that are there.

    The same command goes on when more arrives: what was taken in is in the run's journal, also where the files are
    gone since.

    Args:
        inboxes: folders or URLs that hold contributions, or such files themselves.
        config: the federation's; its data need not be at hand.
        out: the run's folder.
        observer: hears how far it is.

    Returns:
        The result, or who is missing.

    Raises:
        ConfigError: nothing can be read.
    """
    observer = observer or Observer()
    places = [name for inbox in inboxes for name in (list_files(inbox, SUFFIX) if _is_folder(inbox) else [inbox])]
    setting = Loader(config).setting(config.seed).without_clients()
    agreement = Agreement.of(config, setting).encode()
    clients = config.federation.clients
    trusted = {name: check_public_key(key, f"federation.clients.{name}") for name, key in clients.items() if key}
    members = Members(out / "members.json", hashlib.sha256(agreement).hexdigest(), list(clients), trusted)
    found, refused = _read_all(places, members, config)
    members.save()
    known = {name: member.facts for name, member in sorted(members.enrolled.items())}
    missing = dict.fromkeys(members.awaited(), "nothing came from it")
    contributed = {client_id: [item.place for item in found if item.client_id == client_id] for client_id in known}
    if len(known) < max(1, math.ceil(config.federation.quorum * (members.num_expected or len(known)) - 1e-9)):
        return InboxResult(None, contributed, missing, refused)
    runtime = FilesRuntime(known, found, max_upload_bytes=config.federation.max_upload_bytes)
    table = resolve(config)
    try:
        result = run_method(
            setting,
            named(METHODS, config.method.name, config.method.others, "method"),
            config,
            {key: value for key, value in table.items() if key != "runtime"},
            label=config.method.name,
            folder=out,
            observer=observer,
            runtime=runtime,
        )
    except QuorumError as error:
        if not runtime.unanswered:
            raise
        asked = runtime.unanswered
        exchange = asked[0].exchange
        path = out / "requests" / f"{_number(out, exchange)}_{_file_name(exchange)}{SUFFIX}"
        key = SigningKey.load_or_make(out / "server.key")
        write_atomically(path, seal_requests(asked, known, agreement, key))
        waiting = {request.client_id: f'its answer to "{exchange}" is not there' for request in asked}
        unasked = _unasked(found, runtime, out)
        return InboxResult(None, contributed, {**missing, **waiting}, refused, unasked, path, exchange, error.what)
    return InboxResult(result, contributed, {**missing, **result.missing}, refused, _unasked(found, runtime, out))


def _unasked(found: Sequence[Contribution], runtime: FilesRuntime, out: Path) -> list[str]:
    """Contributions that the run had no use for, now or before."""
    return [
        item.place
        for item in found
        if item.place not in runtime.used and not (out / "journal" / f"{item.answer_key}.json").exists()
    ]


def _is_folder(place: str) -> bool:
    return not place.endswith(SUFFIX)


def _file_name(exchange: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "_-" else "_" for letter in exchange)[:80]


def _number(out: Path, exchange: str) -> int:
    """The same exchange keeps its number, so that a repeated command writes the same file."""
    names = sorted(path.stem for path in (out / "requests").glob(f"*{SUFFIX}"))
    for name in names:
        number, _, rest = name.partition("_")
        if rest == _file_name(exchange):
            return int(number)
    return len(names) + 1


def _admit(members: Members, contribution: Contribution) -> None:
    """Remember who sent a contribution; what a client says of itself last counts."""
    before = members.enrolled.get(contribution.client_id)
    is_last = before is None or before.enrolled_at < contribution.made_at_s
    facts = contribution.facts if is_last or before is None else before.facts
    at = contribution.made_at_s if is_last or before is None else before.enrolled_at
    members.admit(Member(contribution.client_id, contribution.public_key, facts, {}, at))


def _read_all(places: Sequence[str], members: Members, config: Config) -> tuple[list[Contribution], dict[str, str]]:
    found: list[Contribution] = []
    refused: dict[str, str] = {}
    for place in places:
        try:
            contribution, _ = Contribution.read(place, max_upload_bytes=config.federation.max_upload_bytes)
            _admit(members, contribution)
            reason = ""
        except ConfigError as error:
            reason = str(error)
        except FedfuseError as error:
            reason = error.what
        if not reason:
            first = next((old for old in found if old.answer_key == contribution.answer_key), None)
            if first is not None and first.digest != contribution.digest:
                reason = f"the same client answered the same question differently in {first.place}"
        if reason:
            refused[place] = reason
        else:
            found.append(contribution)
    return found, refused
