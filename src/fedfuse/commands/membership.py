"""``fedfuse remove`` and ``fedfuse add``: a client leaves a finished run or comes late, and nobody else computes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfuse.core.cohort import Runtime, check_client_id
from fedfuse.core.errors import ConfigError, JournalError, QuorumError, did_you_mean
from fedfuse.core.journal import Journal
from fedfuse.core.method import Method
from fedfuse.core.registry import METHODS
from fedfuse.experiment import Config, Observer, is_additive_run, read_config, resolve
from fedfuse.experiment.configuration import NamedSection, named, override
from fedfuse.experiment.contributing import source_of_path
from fedfuse.experiment.running import run_method
from fedfuse.experiment.setting import Loader, Setting
from fedfuse.runtimes.members import Members, digest_in
from fedfuse.runtimes.replay import ReplayRuntime

_STAGE = ".changed"


def remove_client(folder: Path, client_id: str, observer: Observer | None = None) -> Mapping[str, Any]:
    """Fuse a finished run again without one client, and forget everything that it sent.

    The result is that of a run in which this client never was. Nobody is asked anything. If the command is
    interrupted, the run is as it was or as it shall be, and the same command finishes.

    Args:
        folder: the run's folder.
        client_id: who leaves.
        observer: hears how far it is.

    Returns:
        The new result, as in ``result.json``.

    Raises:
        ConfigError: this is no such run, there is no such client, or the method's uploads depend on each other.
        JournalError: the journal has lost what another client sent.
    """
    run = _FinishedRun.read(folder)
    data = run.config.data
    members = run.members()
    clients = Loader(run.config).setting(run.config.seed).data.clients if members is None else members.enrolled
    if client_id not in clients:
        # A removal that was interrupted behind the exchange of the results has only this left to do.
        if not _forget(folder, client_id):
            raise ConfigError(
                f'there is no client "{client_id}"', where=str(folder), fix=did_you_mean(client_id, clients)
            )
        return run.facts
    if len(clients) == 1:
        raise ConfigError(f'"{client_id}" is the only client', where=str(folder), fix="delete the run's folder instead")
    if members is not None:
        facts = _fuse_without(run, members, client_id, observer)
        # From here on its name is not let in again, whatever still lies in an inbox.
        members.remove(client_id)
        _forget(folder, client_id)
        return facts
    if client_id in data.late:
        change: dict[str, Any] = {"late": {name: table for name, table in data.late.items() if name != client_id}}
    else:
        change = {"without": sorted({*data.without, client_id})}
    facts = _fuse_again(run, change, client_id, asks=(), observer=observer)
    _forget(folder, client_id)
    return facts


def add_client(
    folder: Path,
    client_id: str,
    path: Path | None = None,
    *,
    source: str = "",
    settings: Sequence[str] = (),
    observer: Observer | None = None,
) -> Mapping[str, Any]:
    """Fuse a finished run again with one more client; only this client computes.

    Args:
        folder: the run's folder.
        client_id: who comes.
        path: the client's data; left out for a client that was removed and whose data the configuration names.
        source: name in the registry of sources; told by the path if left out.
        settings: ``key=value`` of that source.
        observer: hears how far it is.

    Returns:
        The new result, as in ``result.json``.

    Raises:
        ConfigError: this is no such run, the client is there already, its data cannot be used, or the method's uploads
            depend on each other.
        JournalError: the journal has lost what another client sent.
        QuorumError: the new client did not answer.
    """
    run = _FinishedRun.read(folder)
    check_client_id(client_id)
    if run.members() is not None:
        raise ConfigError(
            "the clients of this run come by themselves",
            where=str(folder),
            fix="let the client contribute or join, and run fedfuse fuse or fedfuse serve again",
        )
    data = run.config.data
    if client_id in Loader(run.config).setting(run.config.seed).data.clients:
        raise ConfigError(f'there is a client "{client_id}" already', where=str(folder), fix="give another name")
    if path is not None:
        table: dict[str, Any] = {"source": source or source_of_path(path), "path": str(path)}
        for text in settings:
            table = override(table, text)
        change: dict[str, Any] = {"late": {**data.late, client_id: table}}
    elif client_id in data.without:
        change = {"without": [name for name in data.without if name != client_id]}
    else:
        raise ConfigError(
            f'nothing says where the data of "{client_id}" are', where=str(folder), fix="give --data FILE"
        )
    return _fuse_again(run, change, client_id, asks=(client_id,), observer=observer)


@dataclass(frozen=True)
class _FinishedRun:
    folder: Path
    config: Config
    method: Method
    facts: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> _FinishedRun:
        try:
            facts = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            facts = None
        if not isinstance(facts, dict) or not (folder / "journal").is_dir() or not (folder / "config.yaml").is_file():
            raise ConfigError(
                "this is no finished run with a journal of its own",
                where=str(folder),
                fix="name the folder of a fedfuse run; the runs of a comparison share one journal",
            )
        config = read_config(folder / "config.yaml")
        method: Method = named(METHODS, config.method.name, config.method.others, "method")
        if not is_additive_run(facts):
            raise ConfigError(
                f"in this run of {method.name}, what clients sent depends on the other clients",
                where=str(folder),
                fix="run it again without that client, or use a method that asks its clients once",
            )
        return cls(folder, config, method, facts)

    def members(self) -> Members | None:
        """Who takes part, where the clients were elsewhere; ``None`` for a simulation."""
        path = self.folder / "members.json"
        if not path.is_file():
            return None
        clients = self.config.federation.clients
        return Members(path, digest_in(path), list(clients), clients)


def _fuse_without(run: _FinishedRun, members: Members, client_id: str, observer: Observer | None) -> Mapping[str, Any]:
    """Run the method from the journal with everybody but one client of a real federation."""
    facts = {name: member.facts for name, member in sorted(members.enrolled.items()) if name != client_id}
    clients = {name: key for name, key in run.config.federation.clients.items() if name != client_id}
    federation = run.config.federation.model_copy(update={"clients": clients})
    config = run.config.model_copy(update={"federation": federation})
    setting = Loader(config).setting(config.seed).without_clients()
    return _staged(run, setting, config, config, client_id, observer=observer, runtime=ReplayRuntime(facts))


def _fuse_again(
    run: _FinishedRun, change: Mapping[str, Any], client_id: str, *, asks: Sequence[str], observer: Observer | None
) -> Mapping[str, Any]:
    """Run the method from the journal under a changed configuration, beside the old result, and then replace it."""
    config = run.config.model_copy(update={"data": run.config.data.model_copy(update=dict(change))})
    selected = {"name": "selected", "inner": {"name": config.runtime.name, **config.runtime.others}, "asks": [*asks]}
    asking = config.model_copy(update={"runtime": NamedSection.model_validate(selected)})
    return _staged(run, Loader(config).setting(config.seed), config, asking, client_id, asks=asks, observer=observer)


def _staged(
    run: _FinishedRun,
    setting: Setting,
    config: Config,
    asking: Config,
    client_id: str,
    *,
    asks: Sequence[str] = (),
    observer: Observer | None = None,
    runtime: Runtime | None = None,
) -> Mapping[str, Any]:
    """Run the method beside the old result, and then replace it."""
    stage = run.folder / _STAGE
    # Whether enough clients took part was judged in the run itself; who was missing there stays missing.
    asking = asking.model_copy(update={"federation": asking.federation.model_copy(update={"quorum": 1e-9})})
    shutil.rmtree(stage, ignore_errors=True)
    try:
        result = run_method(
            setting,
            run.method,
            asking,
            resolve(config),
            label=run.facts["method"],
            folder=stage,
            observer=observer or Observer(),
            shared=run.folder,
            seed=config.seed,
            runtime=runtime,
        )
        _check_same_uploads(run, result.facts["uploads"], client_id)
        if client_id in asks and client_id in result.missing:
            raise QuorumError(
                f"{client_id} did not answer: {result.missing[client_id]}",
                where=str(run.folder),
                fix="mend the client and run the same command again; the run is as it was",
            )
        _replace(run.folder, stage)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return result.facts


def _check_same_uploads(run: _FinishedRun, uploads: Mapping[str, Mapping[str, str]], client_id: str) -> None:
    """Everybody else must count with exactly what they sent before."""
    for exchange, digests in run.facts["uploads"].items():
        for other, digest in digests.items():
            if other != client_id and uploads.get(exchange, {}).get(other) != digest:
                raise JournalError(
                    f'the journal no longer holds what {other} sent in "{exchange}"',
                    where=str(run.folder / "journal"),
                    fix=f"ask it again first: fedfuse run {run.folder / 'config.yaml'} --out {run.folder}",
                )


def _replace(folder: Path, stage: Path) -> None:
    """Move the new files over the old ones; the configuration last, because it says which run this is."""
    files = [path.relative_to(stage) for path in sorted(stage.rglob("*")) if path.is_file()]
    last = ("result.json", "config.yaml")
    for name in [f for f in files if str(f) not in last] + [f for f in map(Path, last) if f in files]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(stage / name, folder / name)


def _forget(folder: Path, client_id: str) -> bool:
    """Delete what the journal and the clients' states hold of a client; says whether there was anything."""
    found = False
    with Journal(folder / "journal"):
        for facts_path in sorted([*(folder / "journal").glob("*.json"), *(folder / "journal").glob("*.broken")]):
            owner = None
            with suppress(OSError, ValueError, AttributeError):
                owner = json.loads(facts_path.read_text(encoding="utf-8")).get("client")
            if owner == client_id:
                found = True
                # An entry without its facts does not count, so that a half deleted one is none.
                facts_path.unlink()
                facts_path.with_suffix(".safetensors").unlink(missing_ok=True)
        if found:
            _delete_orphans(folder / "journal")
    if (folder / "clients" / client_id).is_dir():
        found = True
        shutil.rmtree(folder / "clients" / client_id)
    return found


def _delete_orphans(journal: Path) -> None:
    """Uploads without facts never counted, and nothing says whose they are."""
    for upload in journal.glob("*.safetensors"):
        if not upload.with_suffix(".json").exists() and not upload.with_suffix(".broken").exists():
            upload.unlink()
