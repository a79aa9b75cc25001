"""The one seam between server and clients: ``cohort.ask``.

The laws of the contract (encoding, declared keys, checks, journal, quorum, order, ledger, derived seeds) are kept
here, once. A runtime only carries requests to clients and brings replies back.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fedfuse.core import VERSION
from fedfuse.core.artifact import ModelSpec
from fedfuse.core.client import Reply, Request
from fedfuse.core.errors import ConfigError, PayloadError, QuorumError, TaskError, UploadRefused
from fedfuse.core.journal import Entry, Journal, content_key
from fedfuse.core.ledger import Ledger, LedgerEntry
from fedfuse.core.method import Method, Task, TaskSpec, task_spec
from fedfuse.core.payload import Payload, Value, matches, read_header
from fedfuse.core.seeding import derive_seed
from fedfuse.core.settings import to_json

Expectation = Mapping[str, Any]
"""What an upload must look like: key to a tensor or :class:`TensorSpec` (same shape and dtype), or a scalar's type."""

_SLACK_BYTES = 1 << 20


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype that an uploaded tensor must have.

    Args:
        shape: sizes; ``None`` accepts any size of that dimension.
        dtype: the element type.
    """

    shape: tuple[int | None, ...]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class ClientFacts:
    """What the server knows of a client before it asks.

    Args:
        fingerprint: digest of its data, made at the client.
        num_threads: torch threads that it computes with.
        device: kind of device, ``cpu`` or ``cuda``.
    """

    fingerprint: str
    num_threads: int = 1
    device: str = "cpu"


class Runtime(Protocol):
    """Carries requests to clients and brings replies back; keeps no law and decides nothing."""

    def clients(self) -> Mapping[str, ClientFacts]:
        """All clients by id."""
        ...

    def exchange(
        self, requests: Sequence[Request], *, timeout_s: float | None, progress: Callable[[str, int, int], None]
    ) -> Iterator[Reply]:
        """Carry out requests, in any order, and yield each reply when it arrives.

        Args:
            requests: at most one per client.
            timeout_s: most seconds that one client may take; ``None`` is no limit.
            progress: called with (client id, done, total) during long work.
        """
        ...

    def close(self) -> None:
        """Free what the runtime holds."""
        ...


class Replies(Mapping[str, Payload]):
    """Replies of one exchange by client id, in the order of the ids, each read when it is looked at.

    Args:
        entries: client id to journal entry.
        missing: client id to the reason why there is no reply.
    """

    def __init__(self, entries: Mapping[str, Entry], missing: Mapping[str, str]) -> None:
        self._entries = {client_id: entries[client_id] for client_id in sorted(entries)}
        self.missing: Mapping[str, str] = dict(sorted(missing.items()))

    def __getitem__(self, client_id: str) -> Payload:
        return self._entries[client_id].payload()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def uploads(self) -> list[Mapping[str, Value]]:
        """The uploads in client-id order, each opened lazily: tensors are read one at a time.

        Fusion rules take these, so that memory does not grow with the number of clients.
        """
        return [entry.open() for entry in self._entries.values()]

    def numbers(self, key: str) -> dict[str, float]:
        """One number from every client.

        Args:
            key: key of a scalar.

        Returns:
            Client id to number, in client-id order.
        """
        found = {}
        for client_id, entry in self._entries.items():
            value = entry.open()[key]
            found[client_id] = float(value)
        return found


@dataclass(frozen=True)
class Terms:
    """What the operator decides about every exchange, unless the method asks for something else.

    Args:
        quorum: fraction of the asked clients that must answer, in (0, 1].
        timeout_s: most seconds that one client may take; ``None`` is no limit.
        max_upload_bytes: uploads above are refused.
    """

    quorum: float = 1.0
    timeout_s: float | None = None
    max_upload_bytes: int = 4 << 30


class Cohort:
    """The clients as the server's procedure sees them.

    Args:
        runtime: carries the requests.
        method: whose tasks are asked for.
        model_of: client id to the model that it owns; part of every question.
        seed: the run's seed.
        journal: where replies are kept.
        ledger: where bytes are counted.
        terms: the operator's decisions.
        log: called with a table for ``metrics.jsonl``.
        progress: called with (exchange, client id, clients done, clients in all, fraction of this client's work).
    """

    def __init__(
        self,
        *,
        runtime: Runtime,
        method: Method,
        model_of: Callable[[str], ModelSpec],
        seed: int,
        journal: Journal | None = None,
        ledger: Ledger | None = None,
        terms: Terms | None = None,
        log: Callable[[Mapping[str, Any]], None] = lambda facts: None,
        progress: Callable[[str, str, int, int, float], None] = lambda *facts: None,
    ) -> None:
        self._runtime, self._method, self._model_of, self._seed = runtime, method, model_of, seed
        self.journal = journal if journal is not None else Journal()
        self.ledger = ledger if ledger is not None else Ledger()
        self.terms = terms or Terms()
        self._log, self._progress = log, progress
        self._facts = dict(sorted(runtime.clients().items()))
        for client_id in self._facts:
            check_client_id(client_id)
        self._lineage: dict[str, str] = {}
        self._model_digests: dict[str, str] = {}
        self.missing: dict[str, str] = {}
        self.uploads: dict[str, dict[str, str]] = {}
        self.waited_s = 0.0

    @property
    def client_ids(self) -> list[str]:
        """Ids of all clients, sorted."""
        return list(self._facts)

    def ask(
        self,
        task: Task,
        send: Payload | Mapping[str, Payload] | None = None,
        *,
        key: str,
        expect: Callable[[str], Expectation] | Expectation | None = None,
        quorum: float | None = None,
        timeout_s: float | None = None,
    ) -> Replies:
        """Ask clients to carry out a task and wait for their replies.

        Args:
            task: a function of the method, marked with ``@client_task``.
            send: one message for all clients, or client id to its message (then only these are asked).
            key: name of the exchange; unique within the run. Methods that ask the same question under the same key
                share the answer.
            expect: what an upload must look like, for all or by client id. Keys named there must be present with that
                shape and dtype; no others are accepted.
            quorum: fraction of the asked clients that must answer; the operator's default if left out.
            timeout_s: most seconds that one client may take; the operator's default if left out.

        Returns:
            The replies, lazily read, and who is missing.

        Raises:
            QuorumError: too few clients answered. What came is kept; the same command continues.
            TaskError: the method breaks the contract.
        """
        spec = self._spec(task)
        messages = self._messages(send)
        if key in self.ledger.exchanges():
            raise TaskError(
                f'two exchanges have the key "{key}"', where=self._method.name, fix="give each ask a key of its own"
            )
        start = time.perf_counter()
        entries: dict[str, Entry] = {}
        missing: dict[str, str] = {}
        pending: dict[str, Request] = {}
        encoded: dict[int, tuple[bytes, str]] = {}
        for client_id in sorted(messages):
            message = messages[client_id]
            if id(message) not in encoded:
                data = message.encode()
                encoded[id(message)] = (data, message.digest())
            data, digest = encoded[id(message)]
            request = self._request(spec, client_id, key, data, digest)
            found = self.journal.get(request.answer_key)
            if found is not None:
                self._accept(spec, request, found, entries, from_journal=True)
                self._progress(key, client_id, len(entries), len(messages), 1.0)
            else:
                pending[client_id] = request

        self._progress(key, "", len(entries), len(messages), 0.0)

        def tell(client_id: str, done: int, total: int) -> None:
            self._progress(key, client_id, len(entries) + len(missing), len(messages), done / max(1, total))

        limit_s = timeout_s if timeout_s is not None else self.terms.timeout_s
        if pending:
            for reply in self._runtime.exchange(list(pending.values()), timeout_s=limit_s, progress=tell):
                asked = pending.get(reply.client_id)
                if asked is None or reply.client_id in entries or reply.client_id in missing:
                    self._log({"event": "ignored reply", "exchange": key, "client": reply.client_id})
                    continue
                if reply.breaks_contract:
                    raise TaskError(reply.error)
                try:
                    if reply.upload is None:
                        raise UploadRefused(reply.error)
                    self._check(spec, reply, expect)
                    entry = self.journal.put(asked.answer_key, reply.upload, self._entry_facts(spec, asked, reply))
                except UploadRefused as refusal:
                    missing[reply.client_id] = str(refusal)
                    self._count(asked, 0, reply.seconds, reply.peak_rss_bytes, from_journal=False)
                else:
                    self._accept(spec, asked, entry, entries, from_journal=False)
                self._progress(key, reply.client_id, len(entries) + len(missing), len(messages), 1.0)
        for client_id in sorted(set(pending) - set(entries) - set(missing)):
            missing[client_id] = "no reply"
            self._count(pending[client_id], 0, 0.0, 0, from_journal=False)
        self.waited_s += time.perf_counter() - start
        self.missing.update({c: f"{key}: {reason}" for c, reason in sorted(missing.items())})
        for client_id in sorted(missing):
            self._log({"event": "missing", "exchange": key, "client": client_id, "reason": missing[client_id]})
        self._judge(key, len(entries), len(messages), missing, quorum)
        return Replies(entries, missing)

    def _spec(self, task: Task) -> TaskSpec:
        spec = task_spec(task)
        if spec is None:
            name = getattr(task, "__name__", repr(task))
            raise TaskError(
                f'"{name}" is no client task', where=self._method.name, fix="mark it with @client_task(uploads=...)"
            )
        return spec

    def _messages(self, send: Payload | Mapping[str, Payload] | None) -> dict[str, Payload]:
        if send is None or isinstance(send, Payload):
            message = send if send is not None else Payload()
            return dict.fromkeys(self._facts, message)
        unknown = sorted(set(send) - set(self._facts))
        if unknown:
            raise TaskError(
                f'there is no client "{unknown[0]}"',
                where=self._method.name,
                fix=f"clients are: {', '.join(self._facts)}",
            )
        return dict(send)

    def _request(self, spec: TaskSpec, client_id: str, key: str, data: bytes, digest: str) -> Request:
        facts, settings = self._facts[client_id], to_json(self._method)
        seed = derive_seed(self._seed, client_id, key)
        lineage = self._lineage.get(client_id, "") if spec.keeps_state else ""
        if client_id not in self._model_digests:
            self._model_digests[client_id] = self._model_of(client_id).digest
        question = {
            "version": VERSION,
            "task": spec.identity,
            "settings": settings if spec.settings is None else {name: settings[name] for name in spec.settings},
            "exchange": key,
            "client": client_id,
            "sent": digest,
            "model": self._model_digests[client_id],
            "data": facts.fingerprint,
            "seed": seed,
            "lineage": lineage,
            "num_threads": facts.num_threads,
            "device": facts.device,
        }
        return Request(
            method=self._method.name,
            settings=settings,
            task=spec.name,
            exchange=key,
            client_id=client_id,
            seed=seed,
            lineage=lineage,
            answer_key=content_key(question),
            payload=data,
        )

    def _entry_facts(self, spec: TaskSpec, request: Request, reply: Reply) -> dict[str, Any]:
        return {
            "exchange": request.exchange,
            "client": request.client_id,
            "task": spec.identity,
            "seconds": reply.seconds,
            "peak_rss_bytes": reply.peak_rss_bytes,
        }

    def _accept(
        self, spec: TaskSpec, request: Request, entry: Entry, entries: dict[str, Entry], *, from_journal: bool
    ) -> None:
        client_id = request.client_id
        entries[client_id] = entry
        if spec.keeps_state:
            self._lineage[client_id] = request.answer_key
        self._count(
            request,
            entry.facts["upload_bytes"],
            entry.facts["seconds"],
            entry.facts["peak_rss_bytes"],
            from_journal=from_journal,
        )
        self.uploads.setdefault(request.exchange, {})[client_id] = entry.facts["sha256"]
        upload = entry.open()
        for name in upload:
            if name.startswith("curve/"):
                curve = upload[name]
                values = curve.tolist() if isinstance(curve, Tensor) else [curve]
                self._log(
                    {
                        "exchange": request.exchange,
                        "client": client_id,
                        "curve": name.removeprefix("curve/"),
                        "values": values,
                    }
                )

    def _count(
        self, request: Request, upload_bytes: int, seconds: float, peak_rss_bytes: int, *, from_journal: bool
    ) -> None:
        entry = LedgerEntry(
            request.exchange, request.client_id, upload_bytes, len(request.payload), seconds, from_journal
        )
        self.ledger.add(entry, peak_rss_bytes)

    def _check(self, spec: TaskSpec, reply: Reply, expect: Callable[[str], Expectation] | Expectation | None) -> None:
        assert reply.upload is not None
        wanted = expect(reply.client_id) if callable(expect) else expect
        check_upload(reply.client_id, reply.upload, spec.uploads, wanted, self.terms.max_upload_bytes)

    def _judge(self, key: str, answered: int, asked: int, missing: Mapping[str, str], quorum: float | None) -> None:
        needed = max(1, math.ceil((self.terms.quorum if quorum is None else quorum) * asked - 1e-9))
        if answered >= needed:
            return
        reasons = "; ".join(f"{client_id}: {' '.join(reason.split())}" for client_id, reason in sorted(missing.items()))
        raise QuorumError(
            f'{answered} of {asked} clients answered the exchange "{key}", {needed} are needed ({reasons})',
            where=str(self.journal.folder or "memory"),
            fix="mend the clients and run the same command again (what came is kept), or lower federation.quorum",
        )


def check_client_id(client_id: str) -> None:
    """Refuse an id that cannot be part of a key and of a file's name.

    Args:
        client_id: at most 100 letters, digits, ``_ . -``, not beginning with a dot.

    Raises:
        ConfigError: it is none.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", client_id):
        raise ConfigError(
            f"{client_id!r:.60} is no client id", where="clients", fix="use at most 100 letters, digits, _ . and -"
        )


def check_upload(
    client_id: str, data: bytes, declared: Mapping[str, str], expect: Expectation | None, max_upload_bytes: int
) -> None:
    """Refuse an upload that is not what the task declared and the server expects.

    Args:
        client_id: who sent it, for the message.
        data: the encoded upload.
        declared: patterns of keys that the task may upload.
        expect: shapes, dtypes and scalar types by key; ``None`` if the server cannot know.
        max_upload_bytes: largest size that is accepted.

    Raises:
        UploadRefused: the reason, with client and key.
    """

    def refuse(reason: str, key: str = "") -> UploadRefused:
        where = f"client {client_id}" + (f", key {key!r:.120}" if key else "")
        return UploadRefused(
            f"the upload was refused: {reason}", where=where, fix="the client must send what the task declares"
        )

    limit = max_upload_bytes
    if expect is not None:
        limit = min(limit, 2 * sum(_expected_bytes(value) for value in expect.values()) + _SLACK_BYTES)
    if len(data) > limit:
        raise refuse(f"{len(data):,} bytes are more than the limit of {limit:,}")
    try:
        # The header alone tells undeclared keys and wrong shapes before any tensor is made.
        header = read_header(data)
        keys = [key for key in header if key != "__metadata__"]
        undeclared = sorted(key for key in keys if not matches(key, declared))
        if undeclared:
            raise refuse("the key was not declared", undeclared[0])
        payload = Payload.decode(data)
    except PayloadError as error:
        raise refuse(error.what) from None
    undeclared = [key for key in payload if not matches(key, declared)]
    if undeclared:
        raise refuse("the key was not declared", undeclared[0])
    if expect is not None:
        for key in sorted(set(expect) - set(payload)):
            raise refuse("the key is missing", key)
        for key in sorted(set(payload) - set(expect)):
            if not key.startswith("curve/"):
                raise refuse("the key was not expected", key)
    for key, value in payload.items():
        reason = _mismatch(value, expect.get(key) if expect else None)
        if reason:
            raise refuse(reason, key)


def _expected_bytes(value: Tensor | TensorSpec | type) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, TensorSpec) and None not in value.shape:
        return math.prod(size or 0 for size in value.shape) * value.dtype.itemsize
    return 1 << 24


def _mismatch(value: Value, expected: Tensor | TensorSpec | type | None) -> str:
    """Why a value is not acceptable; empty if it is."""
    if isinstance(value, Tensor):
        if _has_holes(value):
            return "it holds NaN or infinite values"
        if isinstance(expected, type):
            return f"it is a tensor, wanted a {expected.__name__}"
        if expected is not None and value.dtype != expected.dtype:
            return f"its dtype is {value.dtype}, wanted {expected.dtype}"
        if expected is not None and not _fits(tuple(value.shape), tuple(expected.shape)):
            return f"its shape is {tuple(value.shape)}, wanted {tuple(expected.shape)}"
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        return "it holds NaN or infinite values"
    if expected is not None and (not isinstance(expected, type) or type(value) is not expected):
        wanted = expected.__name__ if isinstance(expected, type) else "tensor"
        return f"it is a {type(value).__name__}, wanted a {wanted}"
    return ""


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(want in (None, have) for want, have in zip(wanted, shape, strict=True))


def _has_holes(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return False
    # Torch stores numbers of 8 bits but can hardly compute with them.
    return not bool(torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all())
