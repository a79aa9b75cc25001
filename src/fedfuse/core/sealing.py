"""Sealed messages: parts and a manifest in one run of bytes, with checksums and an Ed25519 signature.

A message that leaves a machine, by network or as a file that is carried by hand, is sealed. It is a payload (see
``fedfuse.core.payload``), so there is one decoder for everything that comes from outside.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError, FedfuseError, PayloadError, SealError
from fedfuse.core.files import write_atomically, write_private
from fedfuse.core.payload import Payload

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_FORMAT = 1
_PURPOSE = b"fedfuse sealed message 1\n"
_MAX_MANIFEST_BYTES = 16 << 20


class SigningKey:
    """A private Ed25519 key; whoever holds it is the client (or the server) that it was made for.

    Args:
        private: the key.
    """

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public_key: str = private.public_key().public_bytes_raw().hex()

    @classmethod
    def generate(cls) -> SigningKey:
        """A new key."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: str | Path) -> SigningKey:
        """Read a key that :meth:`save` wrote.

        Args:
            path: a PEM file.

        Raises:
            ConfigError: there is no such key.
        """
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        fix = "name a file that fedfuse certs or fedfuse contribute made"
        try:
            private = load_pem_private_key(Path(path).read_bytes(), password=None)
        except OSError as error:
            raise ConfigError(f"cannot read the signing key: {error.strerror}", where=str(path), fix=fix) from None
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise ConfigError("the file holds no signing key", where=str(path), fix=fix) from None
        if not isinstance(private, Ed25519PrivateKey):
            raise ConfigError("the file holds a key of another kind than Ed25519", where=str(path), fix=fix)
        return cls(private)

    @classmethod
    def load_or_make(cls, path: str | Path) -> SigningKey:
        """Read a key, or make one and keep it there.

        Args:
            path: a PEM file.
        """
        path = Path(path)
        if path.exists():
            return cls.load(path)
        key = cls.generate()
        key.save(path)
        return key

    def save(self, path: str | Path) -> None:
        """Write the key so that only its owner can read it.

        Args:
            path: a PEM file that is not there yet.

        Raises:
            ConfigError: there is such a file, or it cannot be written.
        """
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        write_private(Path(path), self._private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))

    def sign(self, message: bytes) -> bytes:
        """The signature of a message, 64 bytes.

        Args:
            message: what is signed.
        """
        return self._private.sign(message)

    def blinded(self, fact: str) -> str:
        """A digest that stands for a fact and that only the holder of this key can make.

        The digest of a client's data would let anybody who guesses the data check the guess.

        Args:
            fact: for instance a fingerprint.

        Returns:
            64 hexadecimal digits, the same every time.
        """
        # Ed25519 signatures are deterministic.
        return hashlib.sha256(self.sign(b"fedfuse blinded fact 1\n" + fact.encode())).hexdigest()


def check_public_key(text: str, where: str) -> str:
    """Refuse a text that is no public key.

    Args:
        text: 64 hexadecimal digits.
        where: what it is about, for the message.

    Returns:
        The text in small letters.

    Raises:
        ConfigError: it is none.
    """
    try:
        if len(bytes.fromhex(text)) == 32 and len(text) == 64:
            return text.lower()
    except ValueError:
        pass
    raise ConfigError(
        f"{text!r:.80} is no public key", where=where, fix="give the 64 digits that the client's command prints"
    )


@dataclass(frozen=True)
class Sealed:
    """A message whose signature and checksums were verified.

    Args:
        manifest: what the message is; JSON.
        parts: name to bytes.
        public_key: who signed it, 64 hexadecimal digits; whether that one may, is for the reader to decide.
    """

    manifest: Mapping[str, Any]
    parts: Mapping[str, bytes]
    public_key: str

    def text(self, key: str) -> str:
        """A text of the manifest.

        Args:
            key: its key.

        Raises:
            SealError: there is none.
        """
        value = self.manifest.get(key)
        if not isinstance(value, str):
            raise SealError(f'the manifest has no text "{key}"', fix="ask the sender to make the message again")
        return value

    def part(self, name: str) -> bytes:
        """The bytes of one part.

        Args:
            name: its name.

        Raises:
            SealError: there is no such part.
        """
        if name not in self.parts:
            raise SealError(f'the message has no part "{name}"', fix="ask the sender to make the message again")
        return self.parts[name]


def seal(manifest: Mapping[str, Any], parts: Mapping[str, bytes], key: SigningKey) -> bytes:
    """Sign a manifest together with the checksums of its parts.

    Args:
        manifest: what the message is; JSON.
        parts: name to bytes.
        key: who signs.

    Returns:
        Bytes for :func:`unseal`.
    """
    sums = {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in parts.items()}
    text = json.dumps({"format": _FORMAT, "manifest": manifest, "parts": sums}, sort_keys=True, separators=(",", ":"))
    payload = Payload(
        {"manifest": text, "public_key": key.public_key, "signature": key.sign(_PURPOSE + text.encode()).hex()}
    )
    for name, data in parts.items():
        payload[f"part/{name}"] = _tensor(data)
    return payload.encode()


def unseal(data: bytes, *, max_bytes: int) -> Sealed:
    """Verify a sealed message.

    Args:
        data: what :func:`seal` gave; any other bytes end in an error.
        max_bytes: messages above are refused before anything of them is decoded.

    Returns:
        What was sealed, and by whom.

    Raises:
        SealError: it is none, or something was changed since it was signed.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if len(data) > max_bytes:
        raise _refused(f"{len(data):,} bytes are more than the limit of {max_bytes:,}")
    try:
        payload = Payload.decode(data)
        text, public_key = payload.text("manifest"), payload.text("public_key")
        signature = bytes.fromhex(payload.text("signature"))
        if len(text) > _MAX_MANIFEST_BYTES:
            raise _refused("the manifest is too long")
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(signature, _PURPOSE + text.encode())
        facts = json.loads(text)
        found, manifest, sums = facts["format"], facts["manifest"], facts["parts"]
    except PayloadError as error:
        raise _refused(error.what) from None
    except InvalidSignature:
        raise _refused("its signature does not fit its content") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _refused("it is none") from None
    if found != _FORMAT or not isinstance(manifest, dict) or not isinstance(sums, dict):
        raise _refused(f"its format is {found!r:.20}, this version reads {_FORMAT}")
    parts = {}
    for key in payload:
        value = payload[key]
        if isinstance(value, Tensor):
            name = key.removeprefix("part/")
            if name == key or value.dtype != torch.uint8 or value.dim() != 1:
                raise _refused(f'"{key:.80}" is no part')
            parts[name] = value.numpy().tobytes()
    if set(parts) != set(sums):
        raise _refused("its parts are not those that were signed")
    for name, part in parts.items():
        expected = sums[name].get("sha256") if isinstance(sums[name], dict) else None
        if hashlib.sha256(part).hexdigest() != expected:
            raise _refused(f'the part "{name:.80}" was changed or damaged')
    return Sealed(manifest, parts, public_key.lower())


def read_sealed(path: str | Path, *, max_bytes: int) -> Sealed:
    """Read and verify a sealed message from a file.

    Args:
        path: the file.
        max_bytes: files above are refused before they are read.

    Raises:
        SealError: it cannot be read or verified.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise _refused(f"{size:,} bytes are more than the limit of {max_bytes:,}")
        return unseal(path.read_bytes(), max_bytes=max_bytes)
    except OSError as error:
        raise SealError(f"cannot read the message: {error.strerror}", where=str(path)) from None
    except SealError as error:
        raise SealError(error.what, where=str(path), fix=error.fix) from None


def write_sealed(path: str | Path, manifest: Mapping[str, Any], parts: Mapping[str, bytes], key: SigningKey) -> None:
    """Seal a message into a file, whole or not at all.

    Args:
        path: the file.
        manifest: what the message is; JSON.
        parts: name to bytes.
        key: who signs.

    Raises:
        FedfuseError: the disk is full or may not be written.
    """
    write_atomically(Path(path), seal(manifest, parts, key))


def _tensor(data: bytes) -> Tensor:
    # An empty buffer has no memory that a tensor could share.
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


def _refused(reason: str) -> FedfuseError:
    return SealError(f"the sealed message was refused: {reason}", fix="ask the sender to make and send it again")
