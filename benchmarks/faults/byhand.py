"""Faults of a federation by hand: what may lie in an inbox, and writing contributions through kills and full disks."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from federation import (
    CLIENTS,
    FEDAVG,
    FUSEFL,
    changed,
    digest,
    replies,
    run,
    start,
    undisturbed,
    wait_until,
    warm,
    write,
)
from local import tmpfs
from outcome import ALL_THERE, SAME, Seen, check, fault, said

FAMILY = "by hand, over files"
OTHERS = 4
"""Contributions that are there beside the one that something happens to."""
_MADE: dict[str, Path] = {}


def config_of(home: Path) -> Path:
    """The federation's configuration: five names are expected, whoever comes first under one keeps it.

    Args:
        home: where it is written.
    """
    return write(home / "c.yaml", changed(FEDAVG, {"federation.clients": dict.fromkeys(CLIENTS, "")}))


def inbox_of(home: Path) -> Path:
    """A folder with the contributions of all clients, computed once and copied.

    Args:
        home: the trial's folder.
    """
    from fedfuse.experiment.configuration import read_config
    from fedfuse.experiment.contributing import contribute

    if "all" not in _MADE:
        warm()
        place = home.parent / "contributions"
        config = read_config(config_of(place), [])
        for name in CLIENTS:
            contribute(config, name, out=str(place / "inbox" / f"{name}.fed"), home=place / "homes" / name)
        _MADE["all"] = place
    shutil.copytree(_MADE["all"] / "inbox", home / "inbox")
    return home / "inbox"


def key_of(name: str) -> Any:
    """The signing key of a client.

    Args:
        name: the client's.
    """
    from fedfuse.core.sealing import SigningKey

    return SigningKey.load(_MADE["all"] / "homes" / name / "key.pem")


def resealed(path: Path, key: Any, upload: dict[str, Any] | None = None, **changes: Any) -> None:
    """Sign a contribution anew with something changed.

    Args:
        path: the contribution.
        key: who signs.
        upload: instead of its content.
        changes: of the manifest.
    """
    from fedfuse.core.payload import Payload
    from fedfuse.core.sealing import read_sealed, seal

    found = read_sealed(path, max_bytes=1 << 30)
    parts = dict(found.parts)
    if upload is not None:
        parts["upload"] = Payload(upload).encode()
    path.write_bytes(seal({**found.manifest, **changes}, parts, key))


def upload_of(path: Path) -> dict[str, Any]:
    """The content of a contribution.

    Args:
        path: its file.
    """
    from fedfuse.core.payload import Payload
    from fedfuse.core.sealing import read_sealed

    return dict(Payload.decode(read_sealed(path, max_bytes=1 << 30).part("upload")))


def tried(home: Path, spoil: Callable[[Path], None], *wanted: str) -> Seen:
    """Spoil one contribution of five; then put the good one back.

    Args:
        home: the trial's folder.
        spoil: gets the path of the last client's contribution.
        wanted: what must be said.
    """
    config, inbox, out = config_of(home), inbox_of(home), home / "run"
    expected = undisturbed(FEDAVG, home.parent)
    good = (inbox / f"{CLIENTS[-1]}.fed").read_bytes()
    spoil(inbox / f"{CLIENTS[-1]}.fed")
    code, text = run("fuse", inbox, "--config", config, "--out", out)
    told = said(text, *wanted)
    check(code != 0 and not (out / "result.json").exists(), f"it was fused all the same: {told}")
    before = replies(out)
    check(len(before) in (0, OTHERS), f"{len(before)} replies were journaled")
    for path in inbox.glob("*"):
        if path.stem not in CLIENTS:
            path.unlink()
    (inbox / f"{CLIENTS[-1]}.fed").write_bytes(good)
    code, text = run("fuse", inbox, "--config", config, "--out", out)
    check(code == 0, text[-600:])
    check(before <= replies(out), "an accepted reply is lost")
    check(digest(out) == expected, "another digest")
    return Seen(
        "refused, nothing of it is stored; with the right file the same command ended", ALL_THERE, _line(told, wanted)
    )


def _line(told: str, wanted: tuple[str, ...]) -> str:
    """The sentence in which the first wanted words stand, without the path before it."""
    before = told[: told.find(wanted[0]) + 6]
    starts = [before.rfind(mark) + len(mark) for mark in (".fed: ", "are needed (") if mark in before]
    return told[max(starts, default=0) :][:200]


@fault(FAMILY, "a truncated file")
def truncated(home: Path) -> Seen:
    """The stick was pulled too early."""
    return tried(home, lambda path: path.write_bytes(path.read_bytes()[:-1000]), "bytes")


@fault(FAMILY, "one damaged bit")
def one_bit(home: Path) -> Seen:
    """In the upload."""

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[-500] ^= 4
        path.write_bytes(bytes(data))

    return tried(home, flip, "was changed or damaged")


@fault(FAMILY, "garbage")
def garbage(home: Path) -> Seen:
    """A file of the right name that is something else."""
    return tried(home, lambda path: path.write_bytes(os.urandom(4000)), "the bytes are not a payload")


@fault(FAMILY, "10 GB")
def ten_gigabytes(home: Path) -> Seen:
    """A sparse file of 10 GB: refused by its size, before it is read."""

    def inflate(path: Path) -> None:
        with path.open("r+b") as file:
            file.truncate(10_000_000_000)

    return tried(home, inflate, "10,000,000,000 bytes are more than the limit of")


@fault(FAMILY, "signed by another key")
def foreign_key(home: Path) -> Seen:
    """The server knows the client's key already."""
    from fedfuse.core.sealing import SigningKey

    def spoil(path: Path) -> None:
        good = path.read_bytes()
        resealed(path, SigningKey.generate())
        # Beside the right one of another client, so that the name is taken.
        (path.parent / "z.fed").write_bytes(path.read_bytes())
        path.write_bytes(good)
        path.rename(path.parent / "a.fed")
        config = config_of(home)
        run("fuse", path.parent / "a.fed", "--config", config, "--out", home / "run")
        (path.parent / "a.fed").unlink()

    return tried(home, spoil, CLIENTS[-1], "key")


@fault(FAMILY, "another client's name")
def anothers_name(home: Path) -> Seen:
    """A client signs with its own key in the name of another one."""

    def spoil(path: Path) -> None:
        resealed(path, key_of(CLIENTS[-1]), client=CLIENTS[0])

    return tried(home, spoil, CLIENTS[0], "key")


@fault(FAMILY, "a name that nobody expects")
def unknown_name(home: Path) -> Seen:
    """The allow-list holds five names."""
    return tried(home, lambda path: resealed(path, key_of(CLIENTS[-1]), client="mallory"), "mallory")


@fault(FAMILY, "an old run's file")
def old_run(home: Path) -> Seen:
    """The answer to the same question of a run with another seed."""

    def spoil(path: Path) -> None:
        from fedfuse.experiment.configuration import read_config
        from fedfuse.experiment.contributing import contribute

        config = read_config(config_of(home), ["seed=99"])
        part = _MADE["all"] / "homes" / CLIENTS[-1]
        contribute(config, CLIENTS[-1], out=str(path), home=home / "old", key=part / "key.pem")
        # What a client said of itself last counts, and this one is from last year.
        resealed(path, key_of(CLIENTS[-1]), made_at_s=1e9)

    return tried(home, spoil, CLIENTS[-1])


@fault(FAMILY, "two different answers to one question")
def two_answers(home: Path) -> Seen:
    """The same client, rightly signed, says two things; the first that is read counts, the other one is told."""
    config, inbox, out = config_of(home), inbox_of(home), home / "run"
    path = inbox / f"{CLIENTS[-1]}.fed"
    second = inbox / "z_again.fed"
    shutil.copy(path, second)
    values = {
        k: v + 1 if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in upload_of(path).items()
    }
    resealed(second, key_of(CLIENTS[-1]), values)
    code, text = run("fuse", inbox, "--config", config, "--out", out)
    check(code == 0, text[-600:])
    check(digest(out) == undisturbed(FEDAVG, home.parent), "another digest")
    return Seen("the first counts", SAME, _line(said(text, "answered the same question differently"), ("answered",)))


@fault(FAMILY, "the same file twice")
def twice(home: Path) -> Seen:
    """Under two names, and once more after the run has ended."""
    config, inbox, out = config_of(home), inbox_of(home), home / "run"
    for name in CLIENTS:
        shutil.copy(inbox / f"{name}.fed", inbox / f"{name}_copy.fed")
    for _ in range(2):
        code, text = run("fuse", inbox, "--config", config, "--out", out)
        check(code == 0, text[-600:])
        check(digest(out) == undisturbed(FEDAVG, home.parent), "another digest")
    check(len(replies(out)) == len(CLIENTS), "something counted twice")
    return Seen("each counts once, however often it lies there and the command is run", SAME)


@fault(FAMILY, "NaN in the upload, rightly signed")
def not_a_number(home: Path) -> Seen:
    """The signature says who sent it, not that it is good."""

    def spoil(path: Path) -> None:
        values = upload_of(path)
        key = next(k for k, v in values.items() if isinstance(v, torch.Tensor) and v.is_floating_point())
        values[key] = values[key] * float("nan")
        resealed(path, key_of(CLIENTS[-1]), values)

    return tried(home, spoil, "it holds NaN or infinite values")


@fault(FAMILY, "an undeclared key, rightly signed")
def undeclared(home: Path) -> Seen:
    """Something else than the task declares."""

    def spoil(path: Path) -> None:
        resealed(path, key_of(CLIENTS[-1]), {**upload_of(path), "secret/x": torch.ones(2)})

    return tried(home, spoil, "the key was not declared")


@fault(FAMILY, "costs that are no numbers, rightly signed")
def odd_costs(home: Path) -> Seen:
    """Not a number of seconds, and more memory than there is, in the manifest."""
    config, inbox, out = config_of(home), inbox_of(home), home / "run"
    for name, value in zip(CLIENTS, (float("nan"), float("inf"), -1.0, 1e308, 10**30), strict=True):
        resealed(inbox / f"{name}.fed", key_of(name), seconds=value, made_at_s=value)
    code, text = run("fuse", inbox, "--config", config, "--out", out)
    said(text)
    if code == 0:
        for name in ("result.json", "ledger.json", "members.json"):
            content = (out / name).read_text(encoding="utf-8")
            check("NaN" not in content and "Infinity" not in content, f"{name} is no JSON that others read")
        check(digest(out) == undisturbed(FEDAVG, home.parent), "another digest")
        return Seen("what a client says it cost does not touch the result", SAME)
    for name in CLIENTS:
        shutil.copy(_MADE["all"] / "inbox" / f"{name}.fed", inbox / f"{name}.fed")
    code, again = run("fuse", inbox, "--config", config, "--out", out)
    check(code == 0, again[-600:])
    check(digest(out) == undisturbed(FEDAVG, home.parent), "another digest")
    return Seen("refused", ALL_THERE, _line(said(text, "manifest"), ("manifest",)))


@fault(FAMILY, "kill -9 at every step of writing a contribution")
def killed_contributing(home: Path) -> Seen:
    """``fedfuse contribute`` is killed before every sync and rename of every file that it writes."""
    inbox, out = inbox_of(home), home / "written" / "c.fed"
    name = CLIENTS[-1]
    whole, step, kills = (inbox / f"{name}.fed").read_bytes(), 1, 0
    while True:
        pid = os.fork()
        if pid == 0:
            _dying_contribution(home, name, out, step)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        check(code in (0, -signal.SIGKILL), f"exit code {code}")
        check(not out.exists() or _is_sealed(out), "half a file under the name that was asked for")
        if code == 0:
            break
        kills, step = kills + 1, step + 1
    from fedfuse.core.sealing import read_sealed

    check(kills >= 4, f"only {kills} steps")
    old, new = (upload_of(path) for path in (inbox / f"{name}.fed", out))
    check(all(torch.equal(torch.as_tensor(old[k]), torch.as_tensor(new[k])) for k in old), "another answer")
    check(read_sealed(out, max_bytes=1 << 30).public_key and len(whole), "no signature")
    return Seen(f"killed {kills} times, each time one step later: never half a file, and the answer is the same", SAME)


def _is_sealed(path: Path) -> bool:
    from fedfuse.core.sealing import read_sealed

    return bool(read_sealed(path, max_bytes=1 << 30).parts)


def _dying_contribution(home: Path, name: str, out: Path, last: int) -> None:
    from fedfuse.core import files
    from fedfuse.experiment.configuration import read_config
    from fedfuse.experiment.contributing import contribute

    count = 0

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **others: Any) -> Any:
            nonlocal count
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **others)

        return call

    class Dying:
        replace, fsync = staticmethod(dying(os.replace)), staticmethod(dying(os.fsync))

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

    files.os = Dying()  # type: ignore[assignment]
    code = 1
    try:
        contribute(read_config(config_of(home), []), name, out=str(out), home=home / "killed" / str(last))
        code = 0
    finally:
        os._exit(code)


@fault(FAMILY, "disk full while a contribution is written")
def full_while_contributing(home: Path) -> Seen:
    """On a stick that is too small; then on a larger one."""
    config, inbox = config_of(home), inbox_of(home)
    place = tmpfs(home, 8)
    arguments = ("contribute", config, "--name", CLIENTS[0], "--home", home / "h", "--out", place / "a.fed")
    try:
        code, text = run(*arguments)
        check(code == 2, text[-500:])
        message = said(text, "No space left on device")
        check(not list(place.glob("*.fed")), "half a file is there")
        os.system(f"mount -o remount,size=4096k {place}")
        code, text = run(*arguments)
        check(code == 0, text[-500:])
        old, new = (upload_of(path) for path in (inbox / f"{CLIENTS[0]}.fed", place / "a.fed"))
        check(all(torch.equal(torch.as_tensor(old[k]), torch.as_tensor(new[k])) for k in old), "another answer")
    finally:
        os.system(f"umount {place}")
    return Seen(
        "no file under that name; computed once, the answer was written where there was room",
        SAME,
        message.replace(str(home), "..."),
    )


@fault(FAMILY, "FuseFL over files, with kill -9 of the server in every exchange")
def progressive(home: Path) -> Seen:
    """Five exchanges by hand; each server command is killed once before it is run to its end."""
    table = changed(FUSEFL, {"federation.clients": dict.fromkeys(CLIENTS, "")})
    config, inbox, out = write(home / "c.yaml", table), home / "inbox", home / "run"
    inbox.mkdir()
    from fedfuse.experiment.configuration import read_config
    from fedfuse.experiment.contributing import contribute

    warm()
    read, request, kills = read_config(config, []), None, 0
    for exchange in range(8):
        for name in CLIENTS:
            place = inbox / f"{name}_{exchange}.fed"
            contribute(read, name, out=str(place), request=request, home=home / "homes" / name)
        process = start("fuse", inbox, "--config", config, "--out", out)
        before = len(replies(out))
        wait_until(lambda before=before, process=process: len(replies(out)) > before or process.poll() is not None)
        kills += process.poll() is None
        process.kill()
        process.finish()
        was = replies(out)
        code, text = run("fuse", inbox, "--config", config, "--out", out)
        check(was <= replies(out), "an accepted reply is lost")
        if (out / "result.json").exists():
            check(code == 0, text[-500:])
            break
        said(text)
        request = str(max((out / "requests").glob("*.fed")))
    check(digest(out) == undisturbed(FUSEFL, home.parent), "another digest")
    facts = json.loads((out / "result.json").read_text(encoding="utf-8"))
    check(not facts["missing"], f"missing: {facts['missing']}")
    return Seen(f"{exchange + 1} exchanges, the server killed {kills} times", SAME)
