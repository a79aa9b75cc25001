"""Hostile bytes of any size: what the decoders say, and how much memory they take for it; and the fuzzing so far."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from federation import warm
from fuzz import HOME, MAX_RISE_BYTES, sessions
from outcome import NO_RUN, Seen, Skipped, check, fault

FAMILY = "decoders"
MIB = 1 << 20


def measured(work: Callable[[], Any]) -> tuple[str, int]:
    """Do something in a process of its own.

    Args:
        work: what; must end in an error of fedfuse.

    Returns:
        The error's first line, and how far the memory rose above what it was before.
    """
    from fedfuse.core.client import peak_rss_bytes, reset_peak_rss
    from fedfuse.core.errors import FedfuseError

    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        reset_peak_rss()
        before = peak_rss_bytes()
        try:
            work()
            told = "ACCEPTED"
        except FedfuseError as error:
            told = error.what
        except BaseException as error:
            told = f"NOT OURS: {type(error).__name__}: {error}"
        with os.fdopen(writing, "w") as pipe:
            json.dump([told[:300], peak_rss_bytes() - before], pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    check(text, "the process died")
    told, rise = json.loads(text)
    check(not told.startswith(("NOT OURS", "ACCEPTED")), told)
    return told, rise


def sparse(path: Path, start: bytes, num_bytes: int) -> Path:
    """A file of any size that takes no room.

    Args:
        path: where.
        start: its first bytes; zeros follow.
        num_bytes: its size.

    Returns:
        The path.
    """
    with path.open("wb") as file:
        file.write(start)
        file.truncate(num_bytes)
    return path


@fault(FAMILY, "files of 10 GB with hostile lengths")
def large_files(home: Path) -> Seen:
    """Sparse files: a header of 10 GB, a tensor that says it is 10 GB, one that is."""
    warm()
    from fedfuse.core.payload import PayloadFile
    from fedfuse.core.sealing import read_sealed

    size = 10_000_000_000
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    claims = json.dumps({"w": entry}).encode()
    cases = [
        lambda: PayloadFile(sparse(home / "a", (size - 8).to_bytes(8, "little"), size)),
        lambda: PayloadFile(sparse(home / "b", len(claims).to_bytes(8, "little") + claims, 8 + len(claims) + 100)),
        lambda: read_sealed(sparse(home / "c", (size - 8).to_bytes(8, "little"), size), max_bytes=1 << 30),
        lambda: read_sealed(sparse(home / "d", (100).to_bytes(8, "little"), size), max_bytes=1 << 40),
    ]
    results = [measured(case) for case in cases[:3]]
    worst = max(rise for _, rise in results)
    check(worst < 8 * MIB, f"{worst / MIB:.0f} MiB")
    return Seen(f"{len(results)} files, refused with at most {worst / MIB:.1f} MiB", NO_RUN, results[0][0])


@fault(FAMILY, "JSON bombs in the header")
def json_bombs(home: Path) -> Seen:
    """As much JSON as a header may have, of whatever takes the most memory once it is parsed."""
    warm()
    from fedfuse.core.header import MAX_HEADER_BYTES
    from fedfuse.core.payload import Payload

    def header(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text

    size = MAX_HEADER_BYTES
    many = b"{" + b",".join(b'"%x":{}' % number for number in range(size // 13)) + b"}"
    scalars = json.dumps({"__metadata__": {"fedfuse.scalars": "[" + "[]," * (size // 4) + "[]]"}}).encode()
    texts = {
        "lists": b'{"a":[' + b"[]," * ((size - 16) // 3) + b"[]]}",
        "tables": many,
        "sizes": b'{"a":{"dtype":"U8","shape":[' + b"1," * (size // 2 - 40) + b'1],"data_offsets":[0,1]}}',
        "deep": b"[" * size,
        "digits": b"9" * size,
        "scalars": scalars,
        "too long": b'{"a":"' + b"x" * size + b'"}',
    }
    results = {name: measured(lambda text=text: Payload.decode(header(text))) for name, text in texts.items()}
    worst = max(rise for _, rise in results.values())
    # What the bound on the header is for: parsed JSON takes up to some thirty times its text.
    check(worst < 40 * size, f"{worst / MIB:.0f} MiB: {results}")
    table = ", ".join(f"{name} {rise / MIB:.0f}" for name, (_, rise) in results.items())
    return Seen(f"16 MiB of header each, peak in MiB: {table}", NO_RUN, results["too long"][0])


@fault(FAMILY, "compressed bombs")
def compressed_bombs(home: Path) -> Seen:
    """Bodies of messages over Flower that unpack to 200 times their size, with a limit of 64 MiB."""
    warm()
    try:
        from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

        from fedfuse.runtimes.flower.codec import decode_message
    except ImportError as error:
        raise Skipped(f"Flower is not installed: {error}") from None

    def message(announced: int, body: bytes) -> Any:
        facts = json.dumps({"protocol": 1, "codec": "zlib", "num_bytes": announced, "header": {}})
        array = Array(dtype="uint8", shape=(len(body),), stype="fedfuse.body", data=body)
        content = {"fedfuse.header": ConfigRecord({"fedfuse.header": facts})}
        return RecordDict({**content, "fedfuse.body": ArrayRecord({"fedfuse.body": array})})

    packer = zlib.compressobj(1)
    body = b"".join(packer.compress(bytes(1 << 24)) for _ in range(32)) + packer.flush()
    cases = [(1 << 29, 8), (1000, 8), (64 << 20, 200)]
    told = []
    for announced, limit_mib in cases:
        content = message(announced, body)
        words, rise = measured(lambda content=content: decode_message(content, max_bytes=64 << 20))
        check(rise < limit_mib * MIB, f"{rise / MIB:.0f} MiB for {announced:,} announced bytes")
        told.append((words, rise))
    table = ", ".join(f"{rise / MIB:.0f}" for _, rise in told)
    return Seen(
        f"{len(body):,} bytes for 512 MiB, announced as all, few and the limit: peak {table} MiB", NO_RUN, told[0][0]
    )


@fault(FAMILY, "a large upload, honest")
def large_upload(home: Path) -> Seen:
    """What checking 256 MiB takes beside the bytes themselves: the bound that hostile ones are measured by."""
    warm()
    import torch

    from fedfuse.core.client import peak_rss_bytes, reset_peak_rss
    from fedfuse.core.expecting import check_upload
    from fedfuse.core.payload import Payload

    data = Payload({f"w/{number}": torch.zeros(1 << 24) for number in range(4)}).encode()
    reset_peak_rss()
    before = peak_rss_bytes()
    check_upload("a", data, {"w/*": ""}, None, 1 << 30)
    rise = peak_rss_bytes() - before
    check(rise < 2 * len(data), f"{rise / MIB:.0f} MiB")
    return Seen(f"{len(data) / MIB:.0f} MiB checked with {rise / MIB:.0f} MiB more", NO_RUN)


@fault(FAMILY, "fuzzing")
def fuzzing(home: Path) -> Seen:
    """What ``fuzz.py`` has counted so far."""
    counted = sessions(HOME)
    if not counted:
        raise Skipped("no session yet: python benchmarks/faults/fuzz.py --engine atheris --minutes 30")
    total = sum(session["executions"] for session in counted)
    minutes = sum(session["seconds"] for session in counted) / 60
    worst = max(session["max_rise_bytes"] for session in counted)
    found = sum(session["findings"] for session in counted)
    check(not found, f"{found} findings in {HOME / 'findings'}")
    check(worst < MAX_RISE_BYTES, f"{worst / MIB:.0f} MiB")
    engines = ", ".join(sorted({session["session"].split("_")[0] for session in counted}))
    accepted = sum(session["accepted"] for session in counted)
    return Seen(
        f"{total:,} executions in {minutes:.0f} minutes ({engines}), {accepted:,} of them payloads; no finding, "
        f"at most {worst / MIB:.0f} MiB more for any {256} inputs",
        NO_RUN,
    )
