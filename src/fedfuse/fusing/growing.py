"""A folder that adapters join one by one, and that is a whole adapter after each of them.

What was given is kept beside the result, and the result is made of all of it anew each time. So neither the order in
which adapters came nor what was there and left again changes a bit of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedfuse.core.errors import ArtifactError, ConfigError, JournalError, did_you_mean
from fedfuse.core.files import write_atomically
from fedfuse.core.places import local_folder
from fedfuse.fusing.adapter import Adapter
from fedfuse.fusing.adapters import FusedAdapters, adapter_rule, fuse_adapters
from fedfuse.fusing.files import is_adapter

TABLE = "growing.json"
"""The file that says what has arrived, and how it is fused."""
_ARRIVALS, _VERSIONS, _CURRENT = "arrivals", "versions", "current"
# Keywords of ``fuse_adapters`` that are no settings of a rule.
_OF_FUSING = ("base_model", "dtype", "measures", "hashes")


@dataclass(frozen=True)
class Arrival:
    """An adapter that has come.

    Args:
        name: its own within the folder.
        weight: above 0; only the proportions count.
        digest: SHA-256 of its tensors' file.
    """

    name: str
    weight: float
    digest: str


@dataclass(frozen=True)
class Growth:
    """What has arrived in a folder, and how it is fused.

    Args:
        method: the rule's name.
        rank: of the result, for rules that choose one.
        settings: the rule's.
        arrivals: in the order of their names.
    """

    method: str
    rank: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    arrivals: tuple[Arrival, ...] = ()

    def with_arrival(self, arrival: Arrival) -> Growth:
        """The same with one more.

        Args:
            arrival: of a name that is free.
        """
        return dataclasses.replace(self, arrivals=tuple(sorted([*self.arrivals, arrival], key=lambda a: a.name)))

    def without(self, name: str) -> Growth:
        """The same with one less.

        Args:
            name: of the one that goes.
        """
        return dataclasses.replace(self, arrivals=tuple(a for a in self.arrivals if a.name != name))

    def encode(self) -> bytes:
        """As JSON, the same for the same content."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True).encode()

    @classmethod
    def read(cls, folder: Path) -> Growth | None:
        """What a folder says.

        Args:
            folder: the growing folder.

        Returns:
            The table; nothing where no adapter has ever come.

        Raises:
            ArtifactError: there is something else in the folder, or its table is broken.
        """
        file = folder / _CURRENT / TABLE
        if not file.is_file():
            if is_adapter(folder):
                raise ArtifactError(
                    "the folder holds an adapter that nothing can be added to",
                    where=str(folder),
                    fix="name a new folder, and add this adapter to it first",
                )
            return None
        try:
            table = json.loads(file.read_text(encoding="utf-8"))
            arrivals = tuple(Arrival(**arrival) for arrival in table.pop("arrivals"))
            return cls(**table, arrivals=arrivals)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ArtifactError(f"{TABLE} is broken: {error}", where=str(folder), fix="copy the folder again") from None


def add_adapter(
    folder: str | Path,
    path: str | Path,
    *,
    name: str = "",
    weight: float = 1.0,
    method: str = "",
    rank: int | None = None,
    **settings: Any,
) -> FusedAdapters:
    """Let an adapter join a growing folder; afterwards the folder is the fused adapter of all that came so far.

    Whoever stops this at any moment leaves the adapter that was there before, or the new one. Every arrival reads all
    adapters again.

    Args:
        folder: of the result; begun if it is not there.
        path: the adapter's folder, or its name on the hub. It is copied.
        name: what the folder is to call it; the last part of the path if left out.
        weight: above 0, for instance its number of examples; only the proportions count.
        method: as in :func:`fuse_adapters`, but a rule whose result is an adapter; the first arrival decides,
            ``flora`` if it does not.
        rank: of the result, decided by the first arrival.
        settings: the rule's, decided by the first arrival.

    Returns:
        What the folder now holds.

    Raises:
        ConfigError: the weight, the name or the rule cannot be.
        ArtifactError: this adapter is there already.
    """
    folder, source = Path(folder), local_folder(path)
    if not 0 < weight < float("inf"):
        raise ConfigError(f"{weight} is no weight", where="weight", fix="give a number above 0")
    own = name or source.resolve().name
    if own in ("", ".", "..") or "/" in own or own.startswith("."):
        raise ConfigError(f'"{own}" is no name', where="name", fix="give a plain word")
    adapter = Adapter(source)
    digest = adapter.digest
    with _locked(folder):
        before = Growth.read(folder)
        growth = _agreed(before, method, rank, settings, folder)
        for arrival in growth.arrivals:
            if arrival.digest == digest:
                raise ArtifactError(
                    f'this adapter is already there, as "{arrival.name}"',
                    where=str(path),
                    fix=f'give each adapter once; to change its weight, drop "{arrival.name}" first',
                )
            if arrival.name == own:
                raise ConfigError(
                    f'there is already an adapter "{own}"', where=str(folder), fix="give this one another name"
                )
        _sweep(folder, before)
        target = folder / _ARRIVALS / own
        try:
            _copy(source, adapter.files, target)
            return _switch(folder, growth.with_arrival(Arrival(own, float(weight), digest)))
        except BaseException:
            # Unless the switch itself was the last thing that went well.
            if Growth.read(folder) == before:
                shutil.rmtree(target, ignore_errors=True)
            raise


def drop_adapter(folder: str | Path, name: str) -> FusedAdapters:
    """Let an adapter leave a growing folder, which is then what it would be had this one never come.

    Args:
        folder: the growing folder.
        name: what the folder calls it.

    Returns:
        What the folder now holds.

    Raises:
        ArtifactError: the folder holds no such adapter, or no other.
    """
    folder = Path(folder)
    before = Growth.read(folder)
    if before is None:
        raise ArtifactError("no adapter has come here yet", where=str(folder), fix="name a folder that adapters joined")
    with _locked(folder):
        before = Growth.read(folder) or before
        names = [arrival.name for arrival in before.arrivals]
        if name not in names:
            raise ArtifactError(f'there is no adapter "{name}"', where=str(folder), fix=did_you_mean(name, names))
        if len(names) == 1:
            raise ArtifactError(f'"{name}" is the only adapter', where=str(folder), fix="delete the whole folder")
        _sweep(folder, before)
        return _switch(folder, before.without(name))


def _agreed(before: Growth | None, method: str, rank: int | None, settings: Mapping[str, Any], folder: Path) -> Growth:
    """The folder's rule, which the first arrival decides."""
    if before is not None:
        asked = Growth(method or before.method, before.rank if rank is None else rank, settings or before.settings)
        if asked != dataclasses.replace(before, arrivals=()):
            raise ConfigError(
                f'the adapters here are fused by the rule "{before.method}", and the rule is the folder\'s',
                where=str(folder),
                fix="leave rule, rank and settings out, or begin another folder",
            )
        return before
    growth = Growth(method or "flora", rank, dict(settings))
    rule = adapter_rule(growth.method, rank, {k: v for k, v in settings.items() if k not in _OF_FUSING})
    if not rule.makes_adapter or rule.residual_goes == "base":
        raise ConfigError(
            f'the rule "{growth.method}" changes the base model, so that there is no adapter to grow',
            where="method",
            fix="use flora, which is as exact",
        )
    return growth


def _switch(folder: Path, growth: Growth) -> FusedAdapters:
    """Fuse all arrivals apart, then make the result the folder's by one rename."""
    content = growth.encode()
    version = folder / _VERSIONS / hashlib.sha256(content).hexdigest()[:16]
    names = [arrival.name for arrival in growth.arrivals]
    done = fuse_adapters(
        [folder / _ARRIVALS / name for name in names],
        names=names,
        method=growth.method,
        weights=[arrival.weight for arrival in growth.arrivals],
        rank=growth.rank,
        out=version,
        **growth.settings,
    )
    write_atomically(version / TABLE, content)
    entries = sorted(path.name for path in version.iterdir())
    # What stands in the folder itself leads through the one link that moves.
    for entry in entries:
        if not (folder / entry).is_symlink():
            _link(folder / entry, Path(_CURRENT) / entry)
    _link(folder / _CURRENT, Path(_VERSIONS) / version.name)
    _sweep(folder, growth)
    return dataclasses.replace(done, folder=folder)


def _sweep(folder: Path, growth: Growth | None) -> None:
    """Remove what belongs to no arrival, to no version, or to a process that was killed."""
    kept = {arrival.name for arrival in growth.arrivals} if growth else set()
    current = (folder / _CURRENT).resolve().name if growth else ""
    for parent, wanted in ((_ARRIVALS, kept), (_VERSIONS, {current})):
        for path in sorted((folder / parent).glob("*")):
            if path.name not in wanted:
                shutil.rmtree(path)
    for path in sorted(folder.glob("*")):
        if path.is_symlink() and (path.suffix == ".part" or not path.exists()):
            path.unlink()


def _link(path: Path, target: Path) -> None:
    """Make or move a link, in one step."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise JournalError(
            f"cannot link: {error.strerror}", where=str(path), fix="name a folder on a disk that has symbolic links"
        ) from None


def _copy(source: Path, names: Sequence[str], target: Path) -> None:
    try:
        target.mkdir(parents=True)
        for name in names:
            shutil.copyfile(source / name, target / name)
            _sync(target / name)
        for path in (target, target.parent):
            _sync(path)
    except OSError as error:
        raise JournalError(
            f"cannot copy the adapter: {error.strerror}", where=str(target), fix="free disk space, then try again"
        ) from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise JournalError(f"cannot write: {error.strerror}", where=str(folder), fix="name another folder") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise JournalError(
                "another fedfuse process is using this folder", where=str(folder), fix="wait for it, then try again"
            ) from None
        yield
    except BaseException:
        if is_new and not (folder / _CURRENT).is_symlink():
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def arrivals_of(folder: str | Path) -> Sequence[Arrival]:
    """What has arrived in a growing folder.

    Args:
        folder: the growing folder.

    Returns:
        In the order of the names; empty where nothing has.
    """
    growth = Growth.read(Path(folder))
    return growth.arrivals if growth else ()
