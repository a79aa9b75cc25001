"""The one seam between server and clients: ``cohort.ask``.

The laws of the contract (encoding, declared keys, checks, journal, quorum, order, ledger, derived seeds) are kept
here, once. A runtime only carries requests to clients and brings replies back.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from fedfuse.core import VERSION
from fedfuse.core.artifact import ModelSpec
from fedfuse.core.client import Reply, Request
from fedfuse.core.coding import Coding, check_codec, codec_of
from fedfuse.core.errors import ConfigError, QuorumError, TaskError, UploadRefused
from fedfuse.core.expecting import Expectation, check_upload
from fedfuse.core.fixed_point import SumSettings
from fedfuse.core.guarantee import Releases
from fedfuse.core.journal import Entry, Journal, content_key
from fedfuse.core.known import Known
from fedfuse.core.ledger import Ledger, LedgerEntry
from fedfuse.core.method import Method, Task, TaskSpec, task_spec
from fedfuse.core.payload import Payload, Value
from fedfuse.core.seeding import derive_seed
from fedfuse.core.settings import to_json
from fedfuse.core.summing import SumQuestion, check_secure_aggregation
from fedfuse.core.sums import SUM


@dataclass(frozen=True)
class ClientFacts:
    """What the server knows of a client before it asks.

    Args:
        fingerprint: digest of its data, made at the client.
        num_threads: torch threads that it computes with.
        device: kind of device, ``cpu`` or ``cuda``.
        num_examples: how many examples it trains on, where it says so; no part of any question.
    """

    fingerprint: str
    num_threads: int = 1
    device: str = "cpu"
    num_examples: int | None = None


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
        secure_aggregation: how uploads are added up without being seen; ``None`` shows them to the server.
    """

    quorum: float = 1.0
    timeout_s: float | None = None
    max_upload_bytes: int = 4 << 30
    secure_aggregation: SumSettings | None = None


@dataclass(frozen=True)
class _Overdue:
    """A question that was not answered in time, and how a late answer is checked."""

    spec: TaskSpec
    request: Request
    expect: Callable[[str], Expectation] | Expectation | None
    coding: Coding | None


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
        releases: what is done to every upload before it leaves its client, part of every question, and the account of
            it; nothing is done if left out.
        codec: how every upload is said in fewer bytes after that, see :func:`~fedfuse.core.coding.codec_terms`; part
            of every question. Empty sends uploads as they are.
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
        releases: Releases | None = None,
        codec: Mapping[str, Any] | None = None,
    ) -> None:
        self._runtime, self._method, self._model_of, self._seed = runtime, method, model_of, seed
        self.journal = journal if journal is not None else Journal()
        self.ledger = ledger if ledger is not None else Ledger()
        self.terms = terms or Terms()
        self._log, self._progress = log, progress
        self.releases = releases or Releases()
        self._release = self.releases.terms()
        self._codec = dict(codec or {})
        self._coder = codec_of(self._codec) if self._codec else None
        check_codec(self._codec, self._release.get("mechanism"))
        if self.terms.secure_aggregation is not None:
            check_secure_aggregation(method, self._release.get("mechanism"), self._codec.get("codec", ""))
        self._facts = dict(sorted(runtime.clients().items()))
        for client_id in self._facts:
            check_client_id(client_id)
        self._lineage: dict[str, str] = {}
        self._unsent: dict[tuple[str, str], str] = {}
        self._first_weights: dict[str, Mapping[str, Tensor]] = {}
        self._model_digests: dict[str, str] = {}
        self._overdue: dict[str, _Overdue] = {}
        self.missing: dict[str, str] = {}
        self.late: dict[str, list[str]] = {}
        self.uploads: dict[str, dict[str, str]] = {}
        self.waited_s = 0.0

    @property
    def facts(self) -> Mapping[str, ClientFacts]:
        """What is known of each client, in the order of the ids."""
        return dict(self._facts)

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
        self.releases.begin(key)
        limit_s = timeout_s if timeout_s is not None else self.terms.timeout_s
        if self.terms.secure_aggregation is not None:
            return self._ask_sum(spec, messages, key, expect, quorum, limit_s, self.terms.secure_aggregation)
        start = time.perf_counter()
        entries: dict[str, Entry] = {}
        missing: dict[str, str] = {}
        pending: dict[str, Request] = {}
        codings: dict[str, Coding | None] = {}
        decoded: dict[int, Payload] = {}
        for request in self._requests(spec, key, messages):
            codings[request.client_id] = self._coding(request, decoded)
            found = self.journal.get(request.answer_key)
            if found is not None:
                found = _seen(found, codings[request.client_id])
                self._accept(spec, request, found, entries, from_journal=True)
                self._progress(key, request.client_id, len(entries), len(messages), 1.0)
            else:
                pending[request.client_id] = request

        self._progress(key, "", len(entries), len(messages), 0.0)

        def tell(client_id: str, done: int, total: int) -> None:
            self._progress(key, client_id, len(entries) + len(missing), len(messages), done / max(1, total))

        if pending:
            for reply in self._runtime.exchange(list(pending.values()), timeout_s=limit_s, progress=tell):
                asked = pending.get(reply.client_id)
                if self._take_late(reply):
                    continue
                # An upload counts for the question that it answers, and for no other.
                answers_another = reply.answer_key not in ("", asked.answer_key if asked else "")
                if asked is None or answers_another or reply.client_id in entries or reply.client_id in missing:
                    self._log({"event": "ignored reply", "exchange": key, "client": reply.client_id})
                    continue
                if reply.breaks_contract:
                    raise TaskError(reply.error)
                try:
                    if reply.upload is None:
                        raise UploadRefused(reply.error)
                    coding = codings[reply.client_id]
                    self._check(spec, reply, expect, coding)
                    entry = self.journal.put(asked.answer_key, reply.upload, self._entry_facts(spec, asked, reply))
                    entry = _seen(entry, coding)
                except UploadRefused as refusal:
                    missing[reply.client_id] = str(refusal)
                    self._count(asked, _nothing(reply), from_journal=False)
                else:
                    self._accept(spec, asked, entry, entries, from_journal=False)
                self._progress(key, reply.client_id, len(entries) + len(missing), len(messages), 1.0)
        for client_id in sorted(set(pending) - set(entries) - set(missing)):
            missing[client_id] = "no reply"
            self._count(pending[client_id], _nothing(Reply(client_id)), from_journal=False)
            self._overdue[pending[client_id].answer_key] = _Overdue(
                spec, pending[client_id], expect, codings[client_id]
            )
        self.waited_s += time.perf_counter() - start
        self.missing.update({c: f"{key}: {reason}" for c, reason in sorted(missing.items())})
        for client_id in sorted(missing):
            self._log({"event": "missing", "exchange": key, "client": client_id, "reason": missing[client_id]})
        self._judge(key, len(entries), len(messages), missing, quorum)
        return Replies(self.releases.seen_by_method(key, entries), missing)

    def _ask_sum(
        self,
        spec: TaskSpec,
        messages: Mapping[str, Payload],
        key: str,
        expect: Callable[[str], Expectation] | Expectation | None,
        quorum: float | None,
        timeout_s: float | None,
        settings: SumSettings,
    ) -> Replies:
        """Ask so that the server sees the total alone: one reply, which is the mean and the sum of all."""
        start, num_asked = time.perf_counter(), len(messages)
        requests = list(self._requests(spec, key, messages))
        looks = expect if callable(expect) else lambda client_id: expect
        question = SumQuestion.of(self._method, spec, requests, looks, settings)
        entry = self.journal.get(question.key)
        is_known = entry is not None
        if entry is None:
            finished: set[str] = set()

            def tell(client_id: str, done: int, total: int) -> None:
                if done >= total:
                    finished.add(client_id)
                self._progress(key, client_id, len(finished), num_asked, done / max(1, total))

            self._progress(key, "", 0, num_asked, 0.0)
            num_needed = max(2, self._needed(num_asked, quorum))
            reply = question.carry(self._runtime, num_needed=num_needed, timeout_s=timeout_s, progress=tell)
            if reply.upload is None:
                self._judge(key, len(reply.contributions), num_asked, reply.missing, quorum, at_least=2)
            data = reply.upload or b""
            check_upload(SUM, data, spec.uploads, looks(requests[0].client_id), self.terms.max_upload_bytes)
            entry = self.journal.put(question.key, data, question.entry_facts(spec, reply))
        # The server keeps the total, and nothing of what single clients sent.
        stored_bytes = entry.facts["upload_bytes"]
        for request, cost in question.costs(entry.facts):
            self._count(request, cost, from_journal=is_known, stored_bytes=stored_bytes)
            stored_bytes = 0
        missing: Mapping[str, str] = entry.facts["missing"]
        self.uploads.setdefault(key, {})[SUM] = entry.facts["sha256"]
        self.releases.note(key, SUM, entry.open())
        self.waited_s += time.perf_counter() - start
        self.missing.update({c: f"{key}: {reason}" for c, reason in missing.items()})
        for client_id, reason in missing.items():
            self._log({"event": "missing", "exchange": key, "client": client_id, "reason": reason})
        self._judge(key, num_asked - len(missing), num_asked, missing, quorum)
        self._progress(key, "", num_asked, num_asked, 1.0)
        return Replies({SUM: entry}, missing)

    def collect_late(self) -> dict[str, list[str]]:
        """Take in replies that came after their exchange was over, as far as the runtime has them.

        They change nothing in this run; they are in the journal for whoever asks the same question again.

        Returns:
            Client id to the exchanges that it answered late.
        """
        for reply in getattr(self._runtime, "late_replies", lambda: ())():
            if not self._take_late(reply):
                self._log({"event": "ignored reply", "exchange": "", "client": reply.client_id})
        return {client_id: list(keys) for client_id, keys in sorted(self.late.items())}

    def _take_late(self, reply: Reply) -> bool:
        """Journal an upload that answers an earlier exchange; says whether it was one."""
        overdue = self._overdue.get(reply.answer_key)
        if overdue is None or overdue.request.client_id != reply.client_id:
            return False
        facts = {"exchange": overdue.request.exchange, "client": reply.client_id}
        try:
            if reply.upload is None:
                raise UploadRefused(reply.error)
            self._check(overdue.spec, reply, overdue.expect, overdue.coding)
        except UploadRefused as refusal:
            self._log({"event": "late reply refused", **facts, "reason": str(refusal)})
        else:
            self.journal.put(reply.answer_key, reply.upload, self._entry_facts(overdue.spec, overdue.request, reply))
            self.late.setdefault(reply.client_id, []).append(overdue.request.exchange)
            self._log({"event": "late reply", **facts})
            del self._overdue[reply.answer_key]
        return True

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

    def _requests(self, spec: TaskSpec, key: str, messages: Mapping[str, Payload]) -> Iterator[Request]:
        """The question to each client, in client-id order; a message that several get is encoded once."""
        encoded: dict[int, tuple[bytes, str]] = {}
        for client_id in sorted(messages):
            message = messages[client_id]
            if id(message) not in encoded:
                data = message.encode()
                encoded[id(message)] = (data, message.digest())
            yield self._request(spec, client_id, key, *encoded[id(message)])

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
        if self._release:
            question["release"] = self._release
        unsent = self._unsent.get((client_id, spec.identity), "")
        if self._codec:
            question["upload"] = {**self._codec, "unsent": unsent}
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
            release=self._release,
            codec=self._codec,
            unsent=unsent,
        )

    def _entry_facts(self, spec: TaskSpec, request: Request, reply: Reply) -> dict[str, Any]:
        return {
            "exchange": request.exchange,
            "client": request.client_id,
            "task": spec.identity,
            "seconds": reply.seconds,
            "peak_rss_bytes": reply.peak_rss_bytes,
            "upload_wire_bytes": reply.upload_wire_bytes,
            "download_wire_bytes": reply.download_wire_bytes,
        }

    def _accept(
        self, spec: TaskSpec, request: Request, entry: Entry, entries: dict[str, Entry], *, from_journal: bool
    ) -> None:
        client_id = request.client_id
        entries[client_id] = entry
        if spec.keeps_state:
            self._lineage[client_id] = request.answer_key
        if self._coder is not None and self._coder.keeps_unsent:
            self._unsent[client_id, spec.identity] = request.answer_key
        self._count(request, entry.facts, from_journal=from_journal)
        self.uploads.setdefault(request.exchange, {})[client_id] = entry.facts["sha256"]
        upload = entry.open()
        self.releases.note(request.exchange, client_id, upload)
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
        self, request: Request, facts: Mapping[str, Any], *, from_journal: bool, stored_bytes: int | None = None
    ) -> None:
        entry = LedgerEntry(
            request.exchange,
            request.client_id,
            facts["upload_bytes"],
            len(request.payload),
            facts["seconds"],
            from_journal,
            # Journals of earlier versions did not measure these.
            facts.get("upload_wire_bytes", 0),
            facts.get("download_wire_bytes", 0),
        )
        self.ledger.add(entry, facts["peak_rss_bytes"], stored_bytes=stored_bytes)

    def _coding(self, request: Request, decoded: dict[int, Payload]) -> Coding | None:
        """How the answer to a question is coded; a message that several clients get is decoded once."""
        if self._coder is None:
            return None
        # Decoded, because the method may go on and change what it sent.
        if id(request.payload) not in decoded:
            decoded[id(request.payload)] = Payload.decode(request.payload)

        def first() -> Mapping[str, Tensor]:
            digest = self._model_digests[request.client_id]
            if digest not in self._first_weights:
                self._first_weights[digest] = self._model_of(request.client_id).build().state_dict()
            return self._first_weights[digest]

        return Coding(self._coder, Known(decoded[id(request.payload)], first))

    def _check(
        self,
        spec: TaskSpec,
        reply: Reply,
        expect: Callable[[str], Expectation] | Expectation | None,
        coding: Coding | None,
    ) -> None:
        assert reply.upload is not None
        wanted = expect(reply.client_id) if callable(expect) else expect
        check_upload(reply.client_id, reply.upload, spec.uploads, wanted, self.terms.max_upload_bytes, coding)

    def _needed(self, asked: int, quorum: float | None) -> int:
        return max(1, math.ceil((self.terms.quorum if quorum is None else quorum) * asked - 1e-9))

    def _judge(
        self,
        key: str,
        answered: int,
        asked: int,
        missing: Mapping[str, str],
        quorum: float | None,
        *,
        at_least: int = 1,
    ) -> None:
        needed = max(at_least, self._needed(asked, quorum))
        if answered >= needed:
            return
        reasons = "; ".join(f"{client_id}: {' '.join(reason.split())}" for client_id, reason in sorted(missing.items()))
        raise QuorumError(
            f'{answered} of {asked} clients answered the exchange "{key}", {needed} are needed ({reasons})',
            where=str(self.journal.folder or "memory"),
            fix="mend the clients and run the same command again (what came is kept), or lower federation.quorum",
        )


def _seen(entry: Entry, coding: Coding | None) -> Entry:
    """An entry that opens as what its codes say; what the journal keeps is what crossed."""
    return entry if coding is None else replace(entry, view=coding.open)


def _nothing(reply: Reply) -> dict[str, Any]:
    """What the ledger counts of a reply that brought nothing that was accepted."""
    return {
        "upload_bytes": 0,
        "seconds": reply.seconds,
        "peak_rss_bytes": reply.peak_rss_bytes,
        "upload_wire_bytes": reply.upload_wire_bytes,
        "download_wire_bytes": reply.download_wire_bytes,
    }


def check_client_id(client_id: str) -> str:
    """Refuse an id that cannot be part of a key and of a file's name.

    Args:
        client_id: at most 100 letters, digits, ``_ . -``, not beginning with a dot.

    Returns:
        The id.

    Raises:
        ConfigError: it is none.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", client_id):
        raise ConfigError(
            f"{client_id!r:.60} is no client id", where="clients", fix="use at most 100 letters, digits, _ . and -"
        )
    return client_id
