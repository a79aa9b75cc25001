"""Masks that cancel in a sum, and shares of the secrets behind them: the primitives of Flower's SecAgg+, put together.

Key agreement, Shamir's shares and encryption are Flower's own functions. Its generator of masks is not used: it folds
a secret of 256 bits into a seed of 32 for numpy's generator, so that whoever sees a masked vector can try all seeds.
Here the secret is the key of AES-256 in counter mode, as in the papers of the protocol (Bonawitz et al., CCS 2017; Bell
et al., CCS 2020).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.fernet import InvalidToken
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, generate_key_pairs, public_key_to_bytes

from fedfuse.core.errors import FedfuseError
from fedfuse.core.sums import Codes

_SCALAR_BYTES = 48
_CHUNK = 1 << 16


class SecureSumError(FedfuseError):
    """A stage of a secure sum cannot be carried out."""


@dataclass(frozen=True)
class KeyPair:
    """A key pair for agreeing on secrets with others.

    Args:
        secret: the private number on Flower's curve, 48 bytes; short, because it is cut into shares.
        public: the public key as PEM.
    """

    secret: bytes
    public: bytes

    @classmethod
    def generate(cls) -> KeyPair:
        """A new pair."""
        private, public = generate_key_pairs()
        return cls(private.private_numbers().private_value.to_bytes(_SCALAR_BYTES, "big"), public_key_to_bytes(public))

    @classmethod
    def of(cls, secret: bytes) -> KeyPair:
        """The pair of a private number, such as shares gave back.

        Args:
            secret: 48 bytes.

        Raises:
            SecureSumError: it is none.
        """
        try:
            public = _private(secret).public_key()
        except ValueError:
            raise SecureSumError("the shares of a key do not fit together") from None
        return cls(secret, public_key_to_bytes(public))

    def agree(self, public: bytes) -> bytes:
        """The secret that this pair and another have in common.

        Args:
            public: the other's public key.

        Returns:
            44 bytes: 256 bits in base 64, the same on both sides.

        Raises:
            SecureSumError: it is no public key of this curve.
        """
        try:
            return generate_shared_key(_private(self.secret), bytes_to_public_key(public))
        except (ValueError, TypeError, AttributeError):
            raise SecureSumError("a public key cannot be read") from None


def _private(secret: bytes) -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(int.from_bytes(secret, "big"), ec.SECP384R1())


def pairwise_seed(pair: KeyPair, public: bytes) -> bytes:
    """The seed of the mask between two clients, 32 bytes.

    Args:
        pair: the keys of one.
        public: the public key of the other.
    """
    return base64.urlsafe_b64decode(pair.agree(public))


def add_mask(codes: Codes, seed: bytes, *, negative: bool = False) -> None:
    """Add a mask in place, modulo 2^64. A seed makes one mask, so it is used for one vector only.

    Args:
        codes: shape ``(n,)``.
        seed: 32 bytes.
        negative: take it away instead.
    """
    stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    zeros = bytes(8 * _CHUNK)
    for start in range(0, len(codes), _CHUNK):
        part = codes[start : start + _CHUNK]
        # Written down in one byte order, so that all machines make the same mask.
        mask = np.frombuffer(stream.update(zeros[: 8 * len(part)]), dtype="<u8").astype(np.uint64, copy=False)
        (np.subtract if negative else np.add)(part, mask, out=part)


def new_seed() -> bytes:
    """The secret of a client's own mask, 32 bytes."""
    return os.urandom(32)


def commitment(seed: bytes) -> str:
    """What a client shows of its seed beforehand, so that nobody can give back another one.

    Args:
        seed: 32 random bytes, which no digest lets anybody guess.
    """
    return hashlib.sha256(b"fedfuse mask 1\n" + seed).hexdigest()


def is_above(first: str, second: str) -> bool:
    """Which of two clients adds the mask between them; the other takes it away.

    Args:
        first: id of a client.
        second: id of another.
    """
    return first > second


def neighbours(client_ids: Sequence[str], num_shares: int | None, attempt: str) -> dict[str, list[str]]:
    """Who shares secrets with whom: everybody, or those next to each other in a circle of random order.

    Args:
        client_ids: all that take part.
        num_shares: size of a neighbourhood, the client itself included; odd. ``None`` is all.
        attempt: a fresh random text that decides the order.

    Returns:
        Client id to the sorted ids of its neighbourhood, itself included; whoever is in mine has me in its own.

    Example:
        >>> neighbours(["a", "b", "c"], None, "x")["b"]
        ['a', 'b', 'c']
    """
    everybody = sorted(client_ids)
    if num_shares is None or num_shares >= len(everybody):
        return dict.fromkeys(everybody, everybody)
    circle = sorted(everybody, key=lambda client_id: hashlib.sha256(f"{attempt}\n{client_id}".encode()).digest())
    half, num = num_shares // 2, len(circle)
    return {
        client_id: sorted(circle[(place + offset) % num] for offset in range(-half, half + 1))
        for place, client_id in enumerate(circle)
    }


@dataclass(frozen=True)
class Shares:
    """One client's shares of another's two secrets.

    Args:
        seed: of the seed of its own mask.
        key: of the key of its masks with others.
    """

    seed: str
    key: str

    @classmethod
    def split(cls, seed: bytes, key: bytes, threshold: int, holders: Sequence[str]) -> dict[str, Shares]:
        """Shares of two secrets for some clients.

        Args:
            seed: one secret.
            key: the other.
            threshold: so many give a secret back, and fewer tell nothing.
            holders: who gets one.
        """
        seeds, keys = (create_shares(secret, threshold, len(holders)) for secret in (seed, key))
        return {holder: cls(a.hex(), b.hex()) for holder, a, b in zip(holders, seeds, keys, strict=True)}

    def lock(self, secret: bytes, *, sender: str, receiver: str, attempt: str) -> str:
        """These shares, to be read by one client only.

        Args:
            secret: that both clients have in common.
            sender: whose secrets they are of.
            receiver: who may read them.
            attempt: of which sum.
        """
        text = json.dumps([sender, receiver, attempt, self.seed, self.key])
        return encrypt(secret, text.encode()).decode("ascii")

    @classmethod
    def unlock(cls, token: str, secret: bytes, *, sender: str, receiver: str, attempt: str) -> Shares:
        """Read shares.

        Args:
            token: what :meth:`lock` gave.
            secret: that both clients have in common.
            sender: who must have sent them.
            receiver: whom they must be for.
            attempt: the sum that they must be for.

        Raises:
            SecureSumError: they are for somebody else, of somebody else, or were changed.
        """
        try:
            *facts, seed, key = json.loads(decrypt(secret, token.encode("ascii")))
            if facts != [sender, receiver, attempt] or not isinstance(seed, str) or not isinstance(key, str):
                raise ValueError
        except (InvalidToken, ValueError, TypeError):
            raise SecureSumError(f"the shares of client {sender} cannot be read") from None
        return cls(seed, key)


def join_shares(shares: Mapping[str, str]) -> bytes:
    """The secret of enough shares.

    Args:
        shares: holder to share.

    Raises:
        SecureSumError: they do not fit together.
    """
    try:
        return combine_shares([bytes.fromhex(shares[holder]) for holder in sorted(shares)])
    except (ValueError, IndexError, TypeError):
        raise SecureSumError("the shares of a secret do not fit together") from None
