"""Fuzzing of everything that reads bytes from outside: payloads, their files, uploads, sealed messages, Flower.

    python benchmarks/faults/fuzz.py --engine atheris --minutes 30
    python benchmarks/faults/fuzz.py --engine hypothesis --minutes 10

Every input goes through every decoder. What must hold: a decoder ends in its result or in an error of fedfuse; two
decoders of the same bytes agree; what was accepted encodes and decodes to itself; and no input, all of which are below
64 KiB, makes the process take 64 MiB more. Executions and seconds of every session are added to ``fuzz.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

MAX_INPUT_BYTES = 64 << 10
MAX_RISE_BYTES = 64 << 20
_BATCH = 256
HOME = Path("runs") / "faults"


class Finding(AssertionError):
    """Something that a decoder must not do."""


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal in type and bits.

    Args:
        a: a value of a payload.
        b: another.
    """
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return bytes(a.reshape(-1).view(torch.uint8).numpy()) == bytes(b.reshape(-1).view(torch.uint8).numpy())
    return type(a) is type(b) and (a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))


def alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two payloads are equal.

    Args:
        a: a payload.
        b: another, or an open file of one.
    """
    return list(a) == list(b) and all(same(a[key], b[key]) for key in a)


class Decoders:
    """All decoders over one input.

    Args:
        scratch: folder for the decoder of files.
    """

    def __init__(self, scratch: Path) -> None:
        from fedfuse.core.errors import FedfuseError, PayloadError, SealError, UploadRefused
        from fedfuse.core.expecting import TensorSpec, check_upload
        from fedfuse.core.payload import Payload, PayloadFile
        from fedfuse.core.sealing import unseal

        self._payload, self._file, self._check, self._unseal = Payload, PayloadFile, check_upload, unseal
        self._payload_error, self._refused, self._seal_error = PayloadError, UploadRefused, SealError
        self._error = FedfuseError
        self._expect = {"w": TensorSpec(()), "n": int}
        self._path = scratch / "input.safetensors"
        self.accepted = 0
        self.more: list[Callable[[bytes], None]] = []

    def __call__(self, data: bytes) -> None:
        """Let every decoder have the input.

        Args:
            data: any bytes.

        Raises:
            Finding: two decoders disagree, or something was accepted that must not be.
        """
        found = self._decoded(data)
        self._lazily(data, found)
        self._checked(data, found)
        try:
            sealed = self._unseal(data, max_bytes=1 << 20)
        except self._seal_error:
            pass
        else:
            json.dumps(dict(sealed.manifest))
        for decode in self.more:
            try:
                decode(data)
            except self._error:
                pass

    def _decoded(self, data: bytes) -> Any:
        try:
            found = self._payload.decode(data)
        except self._payload_error:
            return None
        self.accepted += 1
        if not alike(self._payload.decode(found.encode()), found):
            raise Finding("a payload does not come back")
        return found

    def _lazily(self, data: bytes, found: Any) -> None:
        self._path.write_bytes(data)
        try:
            opened = self._file(self._path)
            values = {key: opened[key] for key in opened}
        except self._payload_error:
            if found is not None:
                raise Finding("the file is refused, its bytes are not") from None
            return
        # What a file holds was decoded before it was written; only there are all values looked at.
        if found is not None and not alike(found, values):
            raise Finding("file and bytes hold different values")

    def _checked(self, data: bytes, found: Any) -> None:
        for declared, expect in (({"w/*": "", "n": ""}, None), ({"w": "", "n": "", "curve/*": ""}, self._expect)):
            try:
                self._check("c", data, declared, expect, 1 << 20)
            except self._refused:
                continue
            if found is None:
                raise Finding("an upload was accepted that is no payload")
            for key in found:
                value = found[key]
                is_finite = bool(torch.isfinite(value.double()).all()) if isinstance(value, torch.Tensor) else True
                if not is_finite or (isinstance(value, float) and not math.isfinite(value)):
                    raise Finding(f"{key!r} is not finite and was accepted")


class Watch:
    """Counts executions, watches memory, keeps what was found.

    Args:
        judge: what gets every input.
        folder: where findings and counts are written.
        session: name of this session's count.
    """

    def __init__(self, judge: Decoders, folder: Path, session: str) -> None:
        self.judge, self.folder, self.session = judge, folder, session
        self.executions, self.findings, self.max_rise_bytes = 0, 0, 0
        self._start, self._before = time.monotonic(), 0
        self._batch: list[bytes] = []
        self._reset()

    def __call__(self, data: bytes) -> None:
        """Try one input.

        Args:
            data: any bytes.
        """
        data = data[:MAX_INPUT_BYTES]
        self._batch.append(data)
        self.executions += 1
        try:
            self.judge(data)
        except Exception as error:
            self._keep(data, f"{type(error).__name__}: {error}")
        if len(self._batch) >= _BATCH:
            self._measure()

    def _reset(self) -> None:
        from fedfuse.core.client import peak_rss_bytes, reset_peak_rss

        self._batch = []
        reset_peak_rss()
        self._before = peak_rss_bytes()

    def _measure(self) -> None:
        from fedfuse.core.client import peak_rss_bytes, reset_peak_rss

        rise = peak_rss_bytes() - self._before
        self.max_rise_bytes = max(self.max_rise_bytes, rise)
        if rise > MAX_RISE_BYTES:
            for data in self._batch:
                reset_peak_rss()
                before = peak_rss_bytes()
                try:
                    self.judge(data)
                except Exception:
                    pass  # it has been kept when it came the first time
                if peak_rss_bytes() - before > MAX_RISE_BYTES:
                    self._keep(data, f"{peak_rss_bytes() - before:,} bytes of memory for {len(data):,} bytes of input")
        self.write()
        self._reset()

    def _keep(self, data: bytes, reason: str) -> None:
        self.findings += 1
        name = hashlib.sha256(data).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{name}.bin").write_bytes(data)
        (self.folder / f"{name}.txt").write_text(reason, encoding="utf-8", errors="backslashreplace")
        print(f"FOUND {name}: {reason[:300]!r}", file=sys.stderr, flush=True)

    def write(self) -> None:
        """Write this session's counts."""
        table = {
            "executions": self.executions,
            "accepted": self.judge.accepted,
            "seconds": round(time.monotonic() - self._start, 1),
            "findings": self.findings,
            "max_rise_bytes": self.max_rise_bytes,
        }
        path = self.folder.parent / "fuzz" / f"{self.session}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(table), encoding="utf-8")


def with_atheris(folder: Path, minutes: float, seed: int) -> None:
    """Coverage-guided: inputs that reach new lines are mutated further.

    Args:
        folder: where findings are written.
        minutes: how long.
        seed: of all choices.
    """
    import atheris

    # Whatever was imported before this line would not be looked into.
    looked_into = ["fedfuse.core", "fedfuse.runtimes.flower", "fedfuse.experiment.agreement", "safetensors.torch"]
    with atheris.instrument_imports(include=looked_into):
        from mutations import Mutator, valid

        more = flower_decoders()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as scratch:
        decoders = Decoders(Path(scratch))
        decoders.more = more
        watch = Watch(decoders, folder, f"atheris_{seed}")
        mutators: dict[int, Mutator] = {}

        def mutate(data: bytes, max_size: int, seed: int) -> bytes:
            mutator = mutators.setdefault(0, Mutator(seed))
            choice = mutator.random.random()
            if choice < 0.3:
                return bytes(atheris.Mutate(data, max_size))
            found = mutator.mutated(data) if choice < 0.7 else mutator.fresh()
            return found[:max_size]

        corpus = Path(scratch) / "corpus"
        corpus.mkdir()
        for number, data in enumerate(valid()):
            (corpus / str(number)).write_bytes(data)
        options = [f"-max_len={MAX_INPUT_BYTES}", f"-seed={seed}", f"-max_total_time={int(minutes * 60)}"]
        atheris.Setup([sys.argv[0], *options, "-rss_limit_mb=4096", str(corpus)], watch, custom_mutator=mutate)
        atheris.Fuzz()


def with_hypothesis(folder: Path, minutes: float, seed: int) -> None:
    """By properties: tables that look like headers, and mutated encodings.

    Args:
        folder: where findings are written.
        minutes: how long.
        seed: of all choices.
    """
    import hypothesis
    from hypothesis import strategies as st
    from mutations import NUMBERS, WORDS, Mutator, joined

    words, numbers = st.sampled_from(WORDS), st.sampled_from(NUMBERS) | st.integers()
    leaves = st.none() | st.booleans() | numbers | words | st.floats() | st.text(max_size=4)
    tables = st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4), max_leaves=12
    )
    sizes = st.lists(st.sampled_from([0, 1, 2, 3, 2**31, 2**40, 2**62, -1]) | numbers, max_size=5)
    tensors = st.fixed_dictionaries({"dtype": words, "shape": sizes, "data_offsets": sizes | tables})
    headers = st.dictionaries(st.sampled_from(["w", "w/a", "n", *WORDS]), tensors | tables, max_size=4)
    scalars = st.dictionaries(words | st.text(max_size=3), tables, max_size=4)
    bodies = st.binary(max_size=24)
    inputs = (
        st.builds(joined, headers, bodies)
        | st.builds(
            lambda table, body: joined({"__metadata__": {"fedfuse.scalars": json.dumps(table)}}, body), scalars, bodies
        )
        | st.builds(joined, headers, bodies, st.integers(0, 2**64 - 1))
        | st.integers(0, 2**63).map(lambda number: Mutator(number).fresh())
        | st.binary(max_size=300)
    )
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as scratch:
        decoders = Decoders(Path(scratch))
        decoders.more = flower_decoders()
        watch = Watch(decoders, folder, f"hypothesis_{seed}")
        end, number = time.monotonic() + minutes * 60, seed
        while time.monotonic() < end:
            number += 1

            @hypothesis.seed(number)
            @hypothesis.settings(
                max_examples=3000, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
            )
            @hypothesis.given(inputs)
            def search(data: bytes) -> None:
                if time.monotonic() < end:
                    watch(data)

            search()
        watch.write()


def flower_decoders() -> list[Callable[[bytes], None]]:
    """Decoders of what comes over Flower, where it is installed: its messages, requests, answers, agreements."""
    import zlib

    from mutations import KEY

    from fedfuse.experiment.agreement import Agreement

    decoders: list[Callable[[bytes], None]] = [lambda data: void(Agreement.decode(data))]
    try:
        from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

        from fedfuse.runtimes.flower import codec
    except ImportError:
        return decoders

    def message(text: str, body: bytes) -> RecordDict:
        array = Array(dtype="uint8", shape=(len(body),), stype="fedfuse.body", data=body)
        header, arrays = ConfigRecord({"fedfuse.header": text}), ArrayRecord({"fedfuse.body": array})
        return RecordDict({"fedfuse.header": header, "fedfuse.body": arrays})

    def as_header(data: bytes) -> None:
        length = min(int.from_bytes(data[:8], "little"), len(data))
        text = data[8 : 8 + length].decode("utf-8", "ignore")
        codec.decode_message(message(text, data[8 + length :]), max_bytes=1 << 20)

    def as_body(data: bytes) -> None:
        for name, body in (("none", data), ("zlib", data), ("zlib", zlib.compress(data, 1)[: data[-1] if data else 1])):
            facts = {"protocol": 1, "codec": name, "num_bytes": len(data) * (len(data) % 3), "header": {"a": 1}}
            try:
                codec.decode_message(message(json.dumps(facts), body), max_bytes=1 << 20)
            except codec.MessageError:
                pass

    def as_request(data: bytes) -> None:
        length = int.from_bytes(data[:8], "little")
        try:
            header = json.loads(data[8 : 8 + length])
        except (ValueError, RecursionError):
            return
        if isinstance(header, dict):
            codec.read_request({**dict.fromkeys(_REQUEST, ""), "seed": 1, "settings": {}, "release": {}}, data)
            codec.read_request(header, data)

    def as_answer(data: bytes) -> None:
        reply = codec.open_reply(
            data, client_id="a", answer_key="0" * 40, public_key=KEY.public_key, max_upload_bytes=1 << 20
        )
        json.dumps([reply.error, reply.seconds, reply.peak_rss_bytes], allow_nan=False)

    return [*decoders, as_header, as_body, as_request, as_answer]


_REQUEST = ("method", "task", "exchange", "client_id", "lineage", "answer_key")


def void(_: object) -> None:
    """Take a result and do nothing with it."""


def sessions(folder: Path) -> list[dict[str, Any]]:
    """Counts of all sessions so far.

    Args:
        folder: the one that they were written to.
    """
    return [
        {"session": path.stem, **json.loads(path.read_text(encoding="utf-8"))}
        for path in sorted((folder / "fuzz").glob("*.json"))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["atheris", "hypothesis"], default="hypothesis")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--out", type=Path, default=HOME)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.inside:
        # In a process of its own: its memory is limited, and a crash of a native library ends only that one.
        command = [sys.executable, *sys.argv, "--seed", str(arguments.seed), "--inside"]
        code = subprocess.run(command, check=False).returncode
        print(json.dumps(sessions(arguments.out), indent=1))
        raise SystemExit(code)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    fuzz = with_atheris if arguments.engine == "atheris" else with_hypothesis
    fuzz(arguments.out / "findings", arguments.minutes, arguments.seed)


if __name__ == "__main__":
    main()
