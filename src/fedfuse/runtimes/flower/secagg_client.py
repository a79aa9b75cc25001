"""A client's side of a secure sum: four messages, and files for what must last from one to the next.

``setup``: the task is carried out, its numbers are checked against the range, new keys are made. ``share``: the secrets
behind the masks are cut into shares for the neighbours. ``mask``: the numbers leave, masked. ``unmask``: shares of the
others' secrets leave, of each client either those of its own mask (it is in the sum) or those of its masks with others
(it vanished), never both.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from fedfuse.core.client import Reply
from fedfuse.core.files import write_atomically
from fedfuse.core.fixed_point import FixedPoint, SumSettings
from fedfuse.core.payload import Payload
from fedfuse.core.sealing import SigningKey, seal
from fedfuse.core.settings import from_json
from fedfuse.core.sums import SumLayout
from fedfuse.runtimes.flower.masks import (
    KeyPair,
    SecureSumError,
    Shares,
    add_mask,
    commitment,
    is_above,
    new_seed,
    pairwise_seed,
)

SETUP, SHARE, MASK, UNMASK = "train.secagg_setup", "query.secagg_share", "query.secagg_mask", "query.secagg_unmask"
"""Types of the messages of the four stages."""

_KEPT_ATTEMPTS = 4
_FIX = "start the server's command again: a new sum is begun, and clients do not compute anew"


@dataclass
class SumState:
    """What a client keeps of one attempt at a sum; secret.

    Args:
        attempt: which one.
        answer_key: the question that is answered by the sum.
        settings: the operator's decisions.
        mask_key: secret of the keys of the masks with others, hexadecimal.
        lock_key: secret of the keys that shares are encrypted by.
        seed: secret of the own mask.
        public_keys: of the neighbourhood, itself included: client id to the keys for masks and for shares.
        tokens: client id to the shares for it, encrypted, as they were sent.
        shares: client id to the shares of its secrets that are held here: of the seed and of the key.
        is_masked: whether the masked numbers were sent.
    """

    attempt: str
    answer_key: str
    settings: dict[str, Any]
    mask_key: str
    lock_key: str
    seed: str
    public_keys: dict[str, list[str]] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    shares: dict[str, list[str]] = field(default_factory=dict)
    is_masked: bool = False


@dataclass(frozen=True)
class SumClient:
    """One client in secure sums.

    Args:
        name: the client's name.
        key: signs all that it says.
        home: the node's folder.
    """

    name: str
    key: SigningKey
    home: Path

    @property
    def _folder(self) -> Path:
        return self.home / "secagg"

    def set_up(self, header: Mapping[str, Any], reply: Reply) -> bytes:
        """Begin: keep the numbers that will be added up and make new keys.

        Args:
            header: ``attempt``, ``layout``, ``settings`` and ``num_clients``.
            reply: what the task gave.

        Returns:
            The sealed public keys, or the reason why this client has nothing to add.

        Raises:
            SecureSumError: the message is none of this stage.
            PayloadError: a number is beyond the range.
        """
        attempt = _attempt(header)
        cost = {"seconds": reply.seconds, "peak_rss_bytes": reply.peak_rss_bytes}
        if reply.upload is None:
            return self._say("setup", attempt, {"error": reply.error, "breaks_contract": reply.breaks_contract, **cost})
        settings = from_json(SumSettings, _table(header, "settings"), where="federation.secure_aggregation")
        num_clients = header.get("num_clients")
        if not isinstance(num_clients, int) or num_clients < 2:
            raise SecureSumError("the message does not say how many clients are added up", fix=_FIX)
        layout = SumLayout.from_json(header.get("layout"))
        codes = layout.encode(Payload.decode(reply.upload), FixedPoint(settings, num_clients))
        mask_pair, lock_pair, seed = KeyPair.generate(), KeyPair.generate(), new_seed()
        state = SumState(
            attempt,
            reply.answer_key,
            dict(_table(header, "settings")),
            mask_pair.secret.hex(),
            lock_pair.secret.hex(),
            seed.hex(),
        )
        self._clear()
        place = self._place(attempt)
        place.mkdir(parents=True, exist_ok=True)
        # Whoever reads these files can take this client's masks away.
        for folder in (self._folder, place):
            folder.chmod(0o700)
        write_atomically(place / "codes", codes.astype("<u8").tobytes())
        self._save(state)
        facts = {
            "error": "",
            "mask_key": mask_pair.public.decode("ascii"),
            "lock_key": lock_pair.public.decode("ascii"),
            "commitment": commitment(seed),
            **cost,
        }
        return self._say("setup", attempt, facts)

    def share(self, header: Mapping[str, Any], body: bytes) -> bytes:
        """Cut this client's secrets into shares, one for each neighbour, readable by that one alone.

        Args:
            header: ``attempt``.
            body: JSON: client id to its two public keys, of this client's neighbourhood.

        Returns:
            The sealed shares, encrypted.

        Raises:
            SecureSumError: the neighbourhood cannot be this client's.
        """
        state = self._load(header)
        given = _read(body)
        keys = {str(name): [str(key) for key in pair] for name, pair in given.items() if isinstance(pair, list)}
        if state.tokens:
            # Two sets of shares of the same secrets would be one too many.
            if keys != state.public_keys:
                raise SecureSumError("the shares were given to others already", fix=_FIX)
            return self._say("share", state.attempt, {"tokens": state.tokens})
        mask_pair, lock_pair = (KeyPair.of(bytes.fromhex(secret)) for secret in (state.mask_key, state.lock_key))
        own = [mask_pair.public.decode("ascii"), lock_pair.public.decode("ascii")]
        all_keys = [key for pair in keys.values() for key in pair]
        if keys.get(self.name) != own or len(keys) != len(given) or any(len(pair) != 2 for pair in keys.values()):
            raise SecureSumError("the keys of this client are not those that it sent", fix=_FIX)
        if len(set(all_keys)) != len(all_keys):
            raise SecureSumError("two clients have the same key", fix=_FIX)
        if len(keys) < 2:
            raise SecureSumError("there is nobody to share secrets with", fix=_FIX)
        threshold = self._threshold(state, keys)
        shares = Shares.split(bytes.fromhex(state.seed), mask_pair.secret, threshold, sorted(keys))
        state.public_keys = keys
        state.shares = {self.name: [shares[self.name].seed, shares[self.name].key]}
        state.tokens = {
            other: shares[other].lock(
                lock_pair.agree(keys[other][1].encode()), sender=self.name, receiver=other, attempt=state.attempt
            )
            for other in sorted(keys)
            if other != self.name
        }
        self._save(state)
        return self._say("share", state.attempt, {"tokens": state.tokens})

    def mask(self, header: Mapping[str, Any], body: bytes) -> bytes:
        """Mask the numbers by the own seed and by the secrets with all neighbours that are still there.

        Args:
            header: ``attempt``.
            body: JSON: client id to the shares that it sent for this client, encrypted.

        Returns:
            The sealed masked numbers.

        Raises:
            SecureSumError: too few neighbours are there, or shares cannot be read.
        """
        state = self._load(header)
        tokens = {str(name): str(token) for name, token in _read(body).items()}
        if not set(tokens) <= set(state.public_keys) - {self.name} or not state.tokens:
            raise SecureSumError("shares came from clients that are no neighbours", fix=_FIX)
        if state.is_masked and set(tokens) | {self.name} != set(state.shares):
            # The same numbers under two sets of masks would tell something about them.
            raise SecureSumError("the numbers were masked for others already", fix=_FIX)
        if len(tokens) + 1 < self._threshold(state, state.public_keys):
            raise SecureSumError("too few neighbours are left", fix=_FIX)
        mask_pair, lock_pair = (KeyPair.of(bytes.fromhex(secret)) for secret in (state.mask_key, state.lock_key))
        for other in sorted(tokens):
            secret = lock_pair.agree(state.public_keys[other][1].encode())
            found = Shares.unlock(tokens[other], secret, sender=other, receiver=self.name, attempt=state.attempt)
            state.shares[other] = [found.seed, found.key]
        codes = np.frombuffer((self._place(state.attempt) / "codes").read_bytes(), dtype="<u8").astype(np.uint64)
        add_mask(codes, bytes.fromhex(state.seed))
        for other in sorted(tokens):
            seed = pairwise_seed(mask_pair, state.public_keys[other][0].encode())
            add_mask(codes, seed, negative=not is_above(self.name, other))
        state.is_masked = True
        self._save(state)
        return self._say("mask", state.attempt, {}, {"codes": codes.astype("<u8", copy=False).tobytes()})

    def unmask(self, header: Mapping[str, Any], body: bytes) -> bytes:
        """Give the shares by which the masks of the total, and of nothing less, can be taken away.

        Args:
            header: ``attempt``.
            body: JSON: ``clients``, the sorted ids of all clients whose masked numbers were added up.

        Returns:
            The sealed shares; this attempt's secrets are forgotten.

        Raises:
            SecureSumError: too few neighbours are in the sum, or the same question was summed over others before.
        """
        state = self._load(header)
        clients = _read(body).get("clients")
        if not state.is_masked or not isinstance(clients, list) or self.name not in clients:
            raise SecureSumError("this client is not in the sum", fix=_FIX)
        active = sorted(set(state.shares) & set(clients))
        if len(active) < self._threshold(state, state.public_keys):
            raise SecureSumError("too few neighbours are in the sum", fix=_FIX)
        self._check_same_sum(state.answer_key, sorted(str(client) for client in clients))
        facts = {
            "seeds": {other: state.shares[other][0] for other in active},
            "keys": {other: state.shares[other][1] for other in sorted(set(state.shares) - set(clients))},
        }
        shutil.rmtree(self._place(state.attempt), ignore_errors=True)
        return self._say("unmask", state.attempt, facts)

    def _check_same_sum(self, answer_key: str, clients: Sequence[str]) -> None:
        """Two sums over different clients that answer the same question differ by a single client's numbers."""
        path = self._folder / "sums" / f"{answer_key}.json"
        if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != list(clients):
            raise SecureSumError(
                "this question was answered before by a sum over other clients, and the difference of the two sums"
                " would show single clients",
                fix="let the same clients take part, or ask another question, for instance with another seed",
            )
        # Kept for good: whoever could make a client forget could ask for the second sum.
        write_atomically(path, json.dumps(list(clients)).encode())

    def _threshold(self, state: SumState, neighbourhood: Mapping[str, Any]) -> int:
        settings = from_json(SumSettings, state.settings, where="federation.secure_aggregation")
        return settings.threshold(len(neighbourhood))

    def _place(self, attempt: str) -> Path:
        return self._folder / "attempts" / attempt

    def _save(self, state: SumState) -> None:
        write_atomically(self._place(state.attempt) / "state.json", json.dumps(asdict(state)).encode())

    def _load(self, header: Mapping[str, Any]) -> SumState:
        attempt = _attempt(header)
        try:
            table = json.loads((self._place(attempt) / "state.json").read_text(encoding="utf-8"))
            return SumState(**{f.name: table[f.name] for f in fields(SumState)})
        except (OSError, ValueError, KeyError, TypeError):
            raise SecureSumError("this client knows nothing of the sum that it is asked about", fix=_FIX) from None

    def _clear(self) -> None:
        if (self._folder / "attempts").is_dir():
            _keep_newest(self._folder / "attempts", _KEPT_ATTEMPTS - 1)

    def _say(
        self, stage: str, attempt: str, facts: Mapping[str, Any], parts: Mapping[str, bytes] | None = None
    ) -> bytes:
        manifest = {"kind": "sum", "stage": stage, "client_id": self.name, "attempt": attempt, **facts}
        return seal(manifest, parts or {}, self.key)


def _keep_newest(folder: Path, number: int) -> None:
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)[: -number or None]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _attempt(header: Mapping[str, Any]) -> str:
    # It comes from outside and becomes a folder's name.
    attempt = header.get("attempt")
    if not isinstance(attempt, str) or not re.fullmatch(r"[0-9a-f]{32}", attempt):
        raise SecureSumError("the message belongs to no sum", fix=_FIX)
    return attempt


def _table(header: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = header.get(key)
    if not isinstance(value, dict):
        raise SecureSumError(f'the message has no "{key}"', fix=_FIX)
    return value


def _read(body: bytes) -> dict[str, Any]:
    try:
        table = json.loads(body)
    except ValueError:
        table = None
    if not isinstance(table, dict):
        raise SecureSumError("the message cannot be read", fix=_FIX)
    return table
