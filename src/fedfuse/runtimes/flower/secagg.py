"""The server's side of a secure sum: it learns the total of the clients' numbers and nothing of any single one.

The protocol is SecAgg+ (Bell et al., CCS 2020), which with everybody as everybody's neighbour is SecAgg (Bonawitz et
al., CCS 2017). Four stages: clients carry out the task and show fresh public keys; they share the secrets of their
masks among neighbours; they send masked numbers; those that are left give the shares by which the masks of the total
can be taken away. Clients work in the first stage only, so that hardly any vanishes between the short ones; one that
does is left out as long as enough of its neighbours stay.
"""

from __future__ import annotations

import json
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from fedfuse.core.client import Request
from fedfuse.core.errors import FedfuseError, PayloadError, QuorumError
from fedfuse.core.fixed_point import FixedPoint, SumSettings
from fedfuse.core.sealing import Sealed
from fedfuse.core.settings import to_json
from fedfuse.core.sums import Codes, Contribution, SumLayout, SumReply
from fedfuse.runtimes.flower.codec import request_header
from fedfuse.runtimes.flower.masks import (
    KeyPair,
    SecureSumError,
    add_mask,
    commitment,
    is_above,
    join_shares,
    neighbours,
    pairwise_seed,
)
from fedfuse.runtimes.flower.secagg_client import MASK, SETUP, SHARE, UNMASK

_STAGES = (SETUP, SHARE, MASK, UNMASK)
_SHARE_BYTES = 8 << 10
"""More than a message holds for each neighbour."""

_SLACK_BYTES = 1 << 20


@dataclass(frozen=True)
class Parcel:
    """What is sent to one client in one stage.

    Args:
        header: JSON; small.
        body: bytes of any length.
    """

    header: Mapping[str, Any]
    body: bytes


@dataclass(frozen=True)
class Answer:
    """What came back from one client in one stage.

    Args:
        client_id: whose it is.
        sealed: verified to be that client's; ``None`` if nothing came.
        error: why nothing came.
        upload_wire_bytes: bytes that crossed from the client.
        download_wire_bytes: bytes that crossed to it.
    """

    client_id: str
    sealed: Sealed | None = None
    error: str = ""
    upload_wire_bytes: int = 0
    download_wire_bytes: int = 0


class Courier(Protocol):
    """Carries the messages of a stage."""

    def carry(
        self,
        kind: str,
        parcels: Mapping[str, Parcel],
        deliver: Callable[[Answer], None],
        *,
        timeout_s: float | None,
        max_bytes: int,
    ) -> None:
        """Send one message to each of some clients and wait for one answer from each.

        Args:
            kind: type of the messages.
            parcels: client id to what it gets.
            deliver: called with each answer as soon as it is there, in any order; it is not kept.
            timeout_s: most seconds until the last answer; ``None`` is no limit.
            max_bytes: larger answers are refused.
        """
        ...


@dataclass
class SecureSum:
    """One attempt at a secure sum.

    Args:
        courier: carries the messages.
        layout: what is added up.
        settings: the operator's decisions.
        progress: called with (client id, stages done, stages in all).
    """

    courier: Courier
    layout: SumLayout
    settings: SumSettings
    progress: Callable[[str, int, int], None] = lambda client_id, done, total: None
    _attempt: str = field(default_factory=lambda: secrets.token_hex(16))
    _exchange: str = ""
    _costs: dict[str, Contribution] = field(default_factory=dict)
    _reasons: dict[str, str] = field(default_factory=dict)
    _rings: dict[str, list[str]] = field(default_factory=dict)
    _keys: dict[str, tuple[str, str]] = field(default_factory=dict)
    _commitments: dict[str, str] = field(default_factory=dict)

    def run(self, requests: Sequence[Request], *, num_needed: int, timeout_s: float | None) -> SumReply:
        """Carry out the four stages.

        Args:
            requests: the questions, at most one per client.
            num_needed: with fewer clients nothing is unmasked.
            timeout_s: most seconds for the task; the stages after it have a limit of their own.

        Returns:
            The total, or none if fewer clients than needed answered.

        Raises:
            QuorumError: so many clients vanished between the stages that the masks cannot be taken away.
            SecureSumError: what clients sent does not fit together.
        """
        point = FixedPoint(self.settings, len(requests))
        self._exchange = requests[0].exchange
        found = self._set_up(requests, timeout_s)
        if len(found) < max(2, num_needed):
            return self._reply(None, found)
        self._rings = neighbours(found, self.settings.num_shares, self._attempt)
        tokens = self._share(found)
        self._check_rings(tokens, tokens, "sharing of secrets")
        total, masked = self._mask(tokens)
        self._check_rings(tokens, masked, "masking")
        if len(masked) < num_needed:
            return self._reply(None, masked)
        self._unmask(total, sorted(tokens), masked)
        try:
            upload = self.layout.decode(total, point).encode()
        except PayloadError as error:
            raise SecureSumError(error.what, where=f"exchange {self._exchange}", fix=error.fix) from None
        return self._reply(upload, masked)

    def _set_up(self, requests: Sequence[Request], timeout_s: float | None) -> list[str]:
        """Clients work and show their keys."""
        facts = {
            "attempt": self._attempt,
            "layout": self.layout.to_json(),
            "settings": to_json(self.settings),
            "num_clients": len(requests),
        }
        parcels = {
            request.client_id: Parcel({**facts, "request": request_header(request)}, request.payload)
            for request in requests
        }

        def take(client_id: str, sealed: Sealed) -> None:
            error, seconds, peak = (sealed.manifest.get(key) for key in ("error", "seconds", "peak_rss_bytes"))
            if isinstance(seconds, (int, float)) and isinstance(peak, int) and 0 <= seconds < float("inf"):
                cost = self._costs[client_id]
                self._costs[client_id] = replace(cost, seconds=float(seconds), peak_rss_bytes=max(0, peak))
            if error:
                raise SecureSumError(str(error)[:2000])
            self._commitments[client_id] = sealed.text("commitment")
            self._keys[client_id] = (sealed.text("mask_key"), sealed.text("lock_key"))

        self._stage(SETUP, parcels, timeout_s, take)
        return sorted(self._keys)

    def _share(self, found: Sequence[str]) -> dict[str, dict[str, str]]:
        """Clients cut their secrets into shares; gives back who sent which to whom, encrypted."""
        parcels = {
            client_id: self._parcel({other: list(self._keys[other]) for other in self._rings[client_id]})
            for client_id in found
        }
        tokens: dict[str, dict[str, str]] = {}

        def take(client_id: str, sealed: Sealed) -> None:
            given = sealed.manifest.get("tokens")
            if not isinstance(given, dict) or sorted([*given, client_id]) != self._rings[client_id]:
                raise SecureSumError("it did not share its secrets with all of its neighbours")
            tokens[client_id] = {str(other): str(token) for other, token in given.items()}

        self._stage(SHARE, parcels, self.settings.stage_timeout_s, take)
        return tokens

    def _mask(self, tokens: Mapping[str, Mapping[str, str]]) -> tuple[Codes, list[str]]:
        """Clients send masked numbers, which are added up as they come and kept nowhere."""
        parcels = {
            client_id: self._parcel({other: tokens[other][client_id] for other in self._others(client_id, tokens)})
            for client_id in tokens
        }
        total = np.zeros(self.layout.size, dtype=np.uint64)

        def take(client_id: str, sealed: Sealed) -> None:
            data = sealed.part("codes")
            if len(data) != 8 * self.layout.size:
                raise SecureSumError("it sent another count of numbers than was asked for")
            np.add(total, np.frombuffer(data, dtype="<u8"), out=total)
            self._costs[client_id] = replace(self._costs[client_id], upload_bytes=len(data))

        return total, self._stage(MASK, parcels, self.settings.stage_timeout_s, take)

    def _unmask(self, total: Codes, shared: Sequence[str], masked: Sequence[str]) -> None:
        """Take the masks away, in place: with shares of seeds of those that are in the sum, and keys of the others."""
        vanished = sorted(set(shared) - set(masked))
        parcels = {client_id: self._parcel({"clients": list(masked)}) for client_id in masked}
        shares: dict[str, dict[str, str]] = defaultdict(dict)

        def take(holder: str, sealed: Sealed) -> None:
            found = {}
            for kind, owners in (("seeds", masked), ("keys", vanished)):
                given = sealed.manifest.get(kind)
                wanted = sorted(set(self._rings[holder]) & set(owners))
                if not isinstance(given, dict) or sorted(given) != wanted:
                    raise SecureSumError("it did not give the shares that were asked for")
                found.update({owner: str(given[owner]) for owner in wanted})
            for owner, share in found.items():
                shares[owner][holder] = share

        stayed = self._stage(UNMASK, parcels, self.settings.stage_timeout_s, take)
        self._check_rings(shared, stayed, "end")
        for owner in masked:
            seed = self._join(owner, shares[owner])
            if commitment(seed) != self._commitments[owner]:
                raise self._false(owner)
            add_mask(total, seed, negative=True)
        for owner in vanished:
            pair = KeyPair.of(self._join(owner, shares[owner]))
            if pair.public.decode("ascii") != self._keys[owner][0]:
                raise self._false(owner)
            for other in sorted(set(self._rings[owner]) & set(masked)):
                add_mask(total, pairwise_seed(pair, self._keys[other][0].encode()), negative=is_above(other, owner))

    def _join(self, owner: str, shares: Mapping[str, str]) -> bytes:
        try:
            return join_shares({holder: shares[holder] for holder in sorted(shares)[: self._threshold(owner)]})
        except SecureSumError:
            raise self._false(owner) from None

    def _false(self, owner: str) -> SecureSumError:
        return SecureSumError(
            f"the shares of the secrets of client {owner} do not fit together",
            where=f"exchange {self._exchange}",
            fix="run the same command again, without this client if it happens again",
        )

    def _stage(
        self,
        kind: str,
        parcels: Mapping[str, Parcel],
        timeout_s: float | None,
        take: Callable[[str, Sealed], None],
    ) -> list[str]:
        """Send and take in what comes back; gives back who answered properly, and notes why the others did not."""
        number, stage, answered = _STAGES.index(kind) + 1, kind.partition("_")[2], []
        max_bytes = (8 * self.layout.size if kind == MASK else 0) + len(parcels) * _SHARE_BYTES + _SLACK_BYTES

        def deliver(answer: Answer) -> None:
            client_id = answer.client_id
            cost = self._costs.get(client_id, Contribution())
            self._costs[client_id] = replace(
                cost,
                upload_wire_bytes=cost.upload_wire_bytes + answer.upload_wire_bytes,
                download_wire_bytes=cost.download_wire_bytes + answer.download_wire_bytes,
            )
            try:
                if answer.sealed is None:
                    raise SecureSumError(answer.error)
                wanted = {"kind": "sum", "stage": stage, "client_id": client_id, "attempt": self._attempt}
                if any(answer.sealed.manifest.get(key) != value for key, value in wanted.items()):
                    raise SecureSumError("its answer belongs to something else")
                take(client_id, answer.sealed)
            except FedfuseError as error:
                self._reasons[client_id] = error.what
            else:
                answered.append(client_id)
                self.progress(client_id, number, len(_STAGES))

        self.courier.carry(kind, parcels, deliver, timeout_s=timeout_s, max_bytes=max_bytes)
        return sorted(answered)

    def _parcel(self, table: Mapping[str, Any]) -> Parcel:
        return Parcel({"attempt": self._attempt}, json.dumps(table, sort_keys=True).encode())

    def _others(self, client_id: str, among: Iterable[str]) -> list[str]:
        return sorted((set(self._rings[client_id]) & set(among)) - {client_id})

    def _threshold(self, client_id: str) -> int:
        return self.settings.threshold(len(self._rings[client_id]))

    def _check_rings(self, needed: Iterable[str], left: Iterable[str], stage: str) -> None:
        """Every client whose masks are in the game must have enough neighbours to take them away."""
        stayed = set(left)
        for client_id in sorted(needed):
            ring, wanted = self._rings[client_id], self._threshold(client_id)
            if (num_left := len(set(ring) & stayed)) < wanted:
                reasons = "; ".join(f"{name}: {' '.join(why.split())}" for name, why in sorted(self._reasons.items()))
                raise QuorumError(
                    f"{num_left} of {len(ring)} clients stayed to the {stage} of the secure sum"
                    f' "{self._exchange}", {wanted} are needed to take the masks away ({reasons or "no reply"})',
                    where="federation.secure_aggregation",
                    fix="run the same command again: a new sum is begun, and clients do not compute anew",
                )

    def _reply(self, upload: bytes | None, clients: Sequence[str]) -> SumReply:
        costs = {client_id: self._costs[client_id] for client_id in clients}
        # Whoever vanished after its masked numbers had come is in the sum all the same.
        return SumReply(upload, costs, {c: why for c, why in sorted(self._reasons.items()) if c not in costs})
