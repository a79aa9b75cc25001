"""Federation by hand: requests and contributions are sealed files that people carry."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedfuse.core import VERSION
from fedfuse.core.client import Reply, Request
from fedfuse.core.cohort import ClientFacts, check_client_id
from fedfuse.core.errors import FedfuseError, SealError
from fedfuse.core.sealing import Sealed, SigningKey, seal, unseal
from fedfuse.core.storage import read_file

SUFFIX = ".fed"
_OVERHEAD_BYTES = 32 << 20
"""What a sealed message may hold beside the upload: manifest, signature, header."""


@dataclass(frozen=True)
class Contribution:
    """What one client sends by hand: its answer to one question.

    Args:
        place: path or URL of its file.
        client_id: who sends it.
        public_key: whose signature it bears.
        facts: what the server may know of the client.
        made_at_s: when it was made, by the client's clock, in seconds since 1970.
        exchange: key of the exchange.
        answer_key: the question that it answers.
        seconds: time that the task took.
        peak_rss_bytes: most memory that its process held.
        num_bytes: size of the file.
        digest: SHA-256 of the upload.
    """

    place: str
    client_id: str
    public_key: str
    facts: ClientFacts
    made_at_s: float
    exchange: str
    answer_key: str
    seconds: float
    peak_rss_bytes: int
    num_bytes: int
    digest: str

    @classmethod
    def read(cls, place: str, *, max_upload_bytes: int) -> tuple[Contribution, bytes]:
        """Read and verify a contribution.

        Args:
            place: path or URL.
            max_upload_bytes: larger uploads are refused.

        Returns:
            The contribution and its upload.

        Raises:
            FedfuseError: it cannot be read, or is none.
        """
        data = read_file(place, max_bytes=max_upload_bytes + _OVERHEAD_BYTES)
        try:
            sealed = unseal(data, max_bytes=max_upload_bytes + _OVERHEAD_BYTES)
            if sealed.text("kind") != "contribution":
                raise SealError(f"this is a {sealed.text('kind')!r:.40}, no contribution", fix="send a contribution")
            upload = sealed.part("upload")
            return cls._of(sealed, place, len(data), hashlib.sha256(upload).hexdigest()), upload
        except FedfuseError as error:
            raise SealError(error.what, where=place, fix=error.fix) from None

    @classmethod
    def _of(cls, sealed: Sealed, place: str, num_bytes: int, digest: str) -> Contribution:
        try:
            manifest = sealed.manifest
            return cls(
                place=place,
                client_id=check_client_id(sealed.text("client")),
                public_key=sealed.public_key,
                facts=facts_of(manifest["facts"]),
                made_at_s=_amount(manifest["made_at_s"]),
                exchange=sealed.text("exchange"),
                answer_key=_checked_key(sealed.text("answer_key")),
                seconds=_amount(manifest["seconds"]),
                peak_rss_bytes=int(_amount(manifest["peak_rss_bytes"])),
                num_bytes=num_bytes,
                digest=digest,
            )
        except (KeyError, TypeError, ValueError, OverflowError):
            raise SealError("its manifest is no contribution's", fix="ask the client to make it again") from None


def seal_contribution(
    request: Request,
    reply: Reply,
    facts: ClientFacts,
    key: SigningKey,
    *,
    declared: Mapping[str, str],
) -> bytes:
    """A client's answer as a self-describing file.

    Args:
        request: what was asked.
        reply: what the client answers; with an upload.
        facts: what the server may know of the client.
        key: the client's.
        declared: the task's declaration: pattern of keys to what they are.

    Returns:
        The bytes of the file.
    """
    assert reply.upload is not None
    manifest = {
        "kind": "contribution",
        "fedfuse": VERSION,
        "client": reply.client_id,
        "facts": asdict(facts),
        "made_at_s": time.time(),
        "method": request.method,
        "task": request.task,
        "exchange": request.exchange,
        "answer_key": request.answer_key,
        "seconds": reply.seconds,
        "peak_rss_bytes": reply.peak_rss_bytes,
        "declared": dict(declared),
    }
    return seal(manifest, {"upload": reply.upload}, key)


def seal_requests(
    requests: Sequence[Request], facts: Mapping[str, ClientFacts], agreement: bytes, key: SigningKey
) -> bytes:
    """The questions of one exchange to several clients, as one file.

    Args:
        requests: at least one.
        facts: what is known of each client; the answer counts for these facts only.
        agreement: what all sides hold alike.
        key: the server's.

    Returns:
        The bytes of the file; a message that goes to several clients is in it once.
    """
    parts = {"agreement": agreement}
    table: dict[str, Any] = {}
    for request in requests:
        name = hashlib.sha256(request.payload).hexdigest()
        parts[name] = request.payload
        question = {k: v for k, v in asdict(request).items() if k not in ("payload", "client_id")}
        table[request.client_id] = {**question, "payload": name, "facts": asdict(facts[request.client_id])}
    manifest = {"kind": "request", "fedfuse": VERSION, "exchange": requests[0].exchange, "requests": table}
    return seal(manifest, parts, key)


def read_request(sealed: Sealed, client_id: str, facts: ClientFacts) -> Request:
    """The question to one client in a file of requests.

    Args:
        sealed: the file, verified.
        client_id: the client.
        facts: what the client says of itself.

    Raises:
        SealError: it is no such file, or this client is not asked, or was asked when it had other data.
    """
    if sealed.text("kind") != "request":
        raise SealError(f"this is a {sealed.text('kind')!r:.40}, no request", fix="name the file that the server sent")
    requests = sealed.manifest.get("requests")
    asked = requests.get(client_id) if isinstance(requests, dict) else None
    if not isinstance(asked, dict):
        names = ", ".join(sorted(requests)) if isinstance(requests, dict) else "nobody"
        raise SealError(f'"{client_id}" is not asked by this request', fix=f"it asks: {names}")
    try:
        known = facts_of(asked["facts"])
        if (known.fingerprint, known.num_threads, known.device) != (facts.fingerprint, facts.num_threads, facts.device):
            raise SealError(
                "the request was made for other data, threads or device than you have now",
                fix="contribute without --request first, so that the server knows",
            )
        return Request(
            method=str(asked["method"]),
            settings=dict(asked["settings"]),
            task=str(asked["task"]),
            exchange=str(asked["exchange"]),
            client_id=client_id,
            seed=int(asked["seed"]),
            lineage=str(asked["lineage"]),
            answer_key=str(asked["answer_key"]),
            payload=sealed.part(str(asked["payload"])),
            release=dict(asked["release"]),
            codec=dict(asked["codec"]),
            unsent=str(asked["unsent"]),
        )
    except (KeyError, TypeError, ValueError):
        raise SealError("the request is incomplete", fix="ask the server's operator to make it again") from None


def _amount(value: Any) -> float:
    # Not a number and infinity are no JSON that others could read in the run's folder.
    if not 0 <= float(value) < float("inf"):
        raise ValueError(value)
    return float(value)


def _checked_key(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{40}", text):
        raise ValueError(text)
    return text


def facts_of(table: Mapping[str, Any]) -> ClientFacts:
    """What is known of a client, from JSON.

    Args:
        table: as ``dataclasses.asdict`` gives it.

    Raises:
        KeyError, TypeError, ValueError: it is something else.
    """
    count = table["num_examples"]
    return ClientFacts(
        str(table["fingerprint"]),
        int(table["num_threads"]),
        str(table["device"]),
        None if count is None else int(count),
    )


class FilesRuntime:
    """Answers from contributions that are there; keeps the questions that nobody answered yet.

    Args:
        facts: what is known of every client that ever contributed, by id.
        contributions: verified, of trusted clients only.
        max_upload_bytes: larger uploads are refused.
    """

    def __init__(
        self, facts: Mapping[str, ClientFacts], contributions: Sequence[Contribution], *, max_upload_bytes: int
    ) -> None:
        self._by_key = {contribution.answer_key: contribution for contribution in reversed(contributions)}
        self._facts = dict(sorted(facts.items()))
        self._max_upload_bytes = max_upload_bytes
        self.unanswered: list[Request] = []
        self.used: set[str] = set()

    def clients(self) -> Mapping[str, ClientFacts]:
        """All clients that contributed, by id."""
        return self._facts

    def exchange(
        self, requests: Sequence[Request], *, timeout_s: float | None, progress: Callable[[str, int, int], None]
    ) -> Iterator[Reply]:
        """Answer what can be answered.

        Args:
            requests: what the run's own journal does not hold.
            timeout_s: not used.
            progress: not used.

        Yields:
            A reply per request that has a contribution; the others are kept in ``unanswered``.
        """
        self.unanswered = []
        for request in requests:
            found = self._by_key.get(request.answer_key)
            if found is None or found.client_id != request.client_id:
                self.unanswered.append(request)
                continue
            self.used.add(found.place)
            try:
                found, upload = Contribution.read(found.place, max_upload_bytes=self._max_upload_bytes)
            except FedfuseError as error:
                yield Reply(request.client_id, error=error.what)
                continue
            yield Reply(
                request.client_id,
                upload=upload,
                seconds=found.seconds,
                peak_rss_bytes=found.peak_rss_bytes,
                answer_key=found.answer_key,
                upload_wire_bytes=found.num_bytes,
            )

    def close(self) -> None:
        """Nothing is held."""
