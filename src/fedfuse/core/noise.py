"""Noise that hides something: Gaussian numbers from a key, and the secret that a client makes its keys from.

Whoever knows the key can take the noise away again. So a client in a real federation draws its keys from a secret that
never leaves it; only a simulation, where one program plays every part, derives them from the run's seed.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError

SECRET_BYTES = 32
_PART = 1 << 19


def noise_secret(path: Path) -> bytes:
    """The secret of a client's machine, made when it is first asked for.

    It is kept so that the same question, asked again, gets the same noise: fresh noise could be averaged away.

    Args:
        path: the secret's file; only its owner may read it.

    Returns:
        32 bytes.

    Raises:
        ConfigError: the file holds something else, or cannot be read or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _write_once(path, os.urandom(SECRET_BYTES))
        secret = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot keep the secret of the noise: {error.strerror}", where=str(path), fix="name another home folder"
        ) from None
    if len(secret) != SECRET_BYTES:
        raise ConfigError(
            f"the secret of the noise has {len(secret)} bytes, not {SECRET_BYTES}",
            where=str(path),
            fix="put the file back from a copy; without it questions that are asked again get other noise",
        )
    return secret


def _write_once(path: Path, secret: bytes) -> None:
    """Written whole under another name and linked, so that of two processes one secret counts for both."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    descriptor = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secret)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
    finally:
        os.unlink(temporary)


class Noise:
    """Gaussian noise from a key, through SHAKE-256: nobody without the key can tell it from chance.

    Args:
        key: 16 bytes or more.

    Example:
        >>> noise = Noise(b"a key of sixteen")
        >>> torch.equal(noise.normal("w", (2, 3)), noise.normal("w", (2, 3)))
        True
    """

    def __init__(self, key: bytes) -> None:
        self._key = hashlib.sha256(key).digest()

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Independent numbers of mean 0 and variance 1.

        Args:
            name: the stream's; other names give other numbers, the same name the same ones.
            shape: of the result.

        Returns:
            Float64.
        """
        count = math.prod(shape)
        stream = self._key + hashlib.sha256(name.encode()).digest()
        parts = [_normal(stream, start, min(_PART, count - start)) for start in range(0, count, _PART)]
        return torch.from_numpy(np.concatenate(parts) if parts else np.empty(0)).reshape(tuple(shape))


def _normal(stream: bytes, start: int, count: int) -> np.ndarray:
    """Box and Muller's transform of uniform numbers with 53 bits; the first of a pair is never 0."""
    pairs = (count + 1) // 2
    drawn = hashlib.shake_256(stream + start.to_bytes(8, "little")).digest(16 * pairs)
    uniform = ((np.frombuffer(drawn, dtype="<u8") >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53
    radius, angle = np.sqrt(-2.0 * np.log(uniform[:pairs])), 2.0 * math.pi * uniform[pairs:]
    found: np.ndarray = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return found[:count]
