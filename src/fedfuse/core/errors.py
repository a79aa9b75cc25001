"""Errors that say what is wrong, where, and how to mend it.

Every error that fedfuse raises on purpose is a :class:`FedfuseError`, so that a program can catch them all by
one name and a reader never meets a bare traceback for a mistake that we foresaw.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedfuseError(Exception):
    """Base of all errors of fedfuse.

    Args:
        what: what is wrong, one sentence without a full stop.
        where: file, client, key or setting that it is about; may be empty.
        fix: what the reader can do about it; may be empty.

    Example:
        >>> print(FedfuseError("the folder is empty", where="runs/a", fix="name another folder"))
        the folder is empty
          where: runs/a
          fix:   name another folder
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.where, self.fix))


def _rebuild(kind: type[FedfuseError], what: str, where: str, fix: str) -> FedfuseError:
    return kind(what, where=where, fix=fix)


class ConfigError(FedfuseError):
    """A configuration, a setting or an argument cannot be used."""


class RegistryError(FedfuseError):
    """A name is unknown to a registry, or registered twice."""


class PayloadError(FedfuseError):
    """Bytes are not a payload, or a value cannot be part of one."""


class UploadRefused(FedfuseError):
    """What a client sent was refused before it was stored; names client, key and reason."""


class SealError(FedfuseError):
    """A sealed message is none, was changed since it was signed, or was signed by somebody else."""


class TaskError(FedfuseError):
    """A client task broke the contract: undeclared key, undeclared setting, undeclared state."""


class QuorumError(FedfuseError):
    """Too few clients answered; the run can be continued by the same command."""


class JournalError(FedfuseError):
    """The journal cannot be read or written, or does not hold what was asked for."""


class ArtifactError(FedfuseError):
    """An artifact cannot be saved, loaded or exported."""


class DataError(FedfuseError):
    """Data cannot be read, split or used by the model."""


class ModelError(FedfuseError):
    """A model cannot be built, described or cut."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Suggest the nearest of some names, as the ``fix`` of an error.

    Args:
        name: what was written.
        options: what could have been meant.

    Returns:
        A sentence that names the nearest option where there is one, and all of them.

    Example:
        >>> did_you_mean("fusfl", ["fedavg", "fusefl"])
        'did you mean "fusefl"? known: fedavg, fusefl'
    """
    known = sorted(options)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f'did you mean "{near[0]}"? ' if near else ""
    return f"{hint}known: {', '.join(known) or 'none'}"
