"""Sums over clients of which the server learns the total alone: numbers as integers that add up without error.

Secure aggregation hides each client's numbers behind random masks that cancel in the total, so everything is counted
in integers modulo 2^64. Here is how an upload becomes such integers and how their total becomes an upload again; the
masks are the runtime's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedfuse.core.errors import ConfigError, PayloadError
from fedfuse.core.fixed_point import SUMS_WHERE, TOTAL_BITS, FixedPoint
from fedfuse.core.payload import Payload, Value, matches

SUM = "sum"
"""Under this name the one reply stands that is the total over all clients."""

Codes = NDArray[np.uint64]
"""Integers modulo 2^64, one per number of an upload."""

_SCALARS: dict[str, type] = {"int": int, "float": float}
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class SumPart:
    """One key of the sum.

    Args:
        key: of the upload.
        kind: ``int`` or ``float`` for a scalar, else the tensor's dtype, such as ``float32``.
        shape: of the tensor; empty for a scalar.
        weight: key of the number that it is averaged by; empty is a plain sum.
    """

    key: str
    kind: str
    shape: tuple[int, ...] = ()
    weight: str = ""

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor; scalars are counted in 64 bits."""
        found = {"int": torch.int64, "float": torch.float64}.get(self.kind) or getattr(torch, self.kind, None)
        if not isinstance(found, torch.dtype):
            raise PayloadError(f'"{self.kind:.40}" is no dtype')
        return found

    @property
    def is_integer(self) -> bool:
        """Whether it is counted in whole numbers."""
        return not self.dtype.is_floating_point

    def numbers(self, value: Value | None) -> NDArray[Any]:
        """A value of this kind, flat, as int64 or float64.

        Args:
            value: what the upload holds under the key.

        Raises:
            PayloadError: it is of another kind.
        """
        wide = torch.int64 if self.is_integer else torch.float64
        if self.kind in _SCALARS:
            if type(value) is not _SCALARS[self.kind]:
                raise PayloadError(f'"{self.key}" is a {type(value).__name__}, wanted a {self.kind}')
            return torch.tensor([value], dtype=wide).numpy()
        if not isinstance(value, Tensor) or value.dtype != self.dtype or tuple(value.shape) != self.shape:
            raise PayloadError(f'"{self.key}" is not of shape {self.shape} and dtype {self.kind}')
        found: NDArray[Any] = value.detach().to("cpu", wide).reshape(-1).numpy()
        return found

    def value(self, numbers: NDArray[Any]) -> Value:
        """The value that has these numbers.

        Args:
            numbers: flat; they are rounded where the kind is a whole number.
        """
        if self.is_integer and numbers.dtype.kind == "f":
            numbers = np.rint(numbers)
        if self.kind in _SCALARS:
            return int(numbers[0]) if self.is_integer else float(numbers[0])
        tensor = torch.from_numpy(numbers)
        return tensor.to(self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class SumLayout:
    """What is added up, key by key; the same at the server and at every client.

    Args:
        parts: by key, sorted.
    """

    parts: tuple[SumPart, ...]
    _by_key: Mapping[str, SumPart] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_key", {part.key: part for part in self.parts})
        for part in self.parts:
            if part.weight:
                self._check_weight(part)

    def _check_weight(self, part: SumPart) -> None:
        weight = self._by_key.get(part.weight)
        fits = weight is not None and weight.shape == part.shape[: len(weight.shape)]
        if weight is None or weight.weight or not weight.is_integer or not fits:
            raise ConfigError(
                f'"{part.key}" cannot be averaged by "{part.weight}"',
                where=SUMS_WHERE,
                fix="a weight is a whole number, or one for each row, that is itself added up",
            )

    @classmethod
    def of(cls, expect: Mapping[str, Any], table: Mapping[str, str], where: str) -> SumLayout:
        """The layout of an upload.

        Args:
            expect: what the upload must look like; see ``Cohort.ask``.
            table: pattern of keys to the key of their weight, empty for a plain sum.
            where: what asks, for messages.

        Raises:
            ConfigError: the server expects something that cannot be added up.
        """
        parts = []
        for key in sorted(expect):
            found = [pattern for pattern in table if matches(key, [pattern])]
            looks = expect[key]
            shape = () if isinstance(looks, type) else tuple(looks.shape)
            kind = looks.__name__ if isinstance(looks, type) else str(looks.dtype).removeprefix("torch.")
            is_number = kind in _SCALARS or (
                not isinstance(looks, type) and (looks.dtype.is_floating_point or looks.dtype in _INTEGERS)
            )
            if not found or not is_number or None in shape:
                raise ConfigError(
                    f'"{key}" cannot be added up over clients without being seen',
                    where=where,
                    fix=f"use other settings of the method, or leave {SUMS_WHERE} out",
                )
            parts.append(SumPart(key, kind, shape, table[found[0]]))
        return cls(tuple(parts))

    def to_json(self) -> list[list[Any]]:
        """The layout as lists that :meth:`from_json` turns back."""
        return [[part.key, part.kind, list(part.shape), part.weight] for part in self.parts]

    @classmethod
    def from_json(cls, rows: Any) -> SumLayout:
        """Read what :meth:`to_json` gave.

        Args:
            rows: from another machine.

        Raises:
            PayloadError: it is none.
        """
        try:
            parts = tuple(
                SumPart(str(key), str(kind), tuple(int(size) for size in shape), str(weight))
                for key, kind, shape, weight in rows
            )
        except (TypeError, ValueError):
            raise PayloadError("this is no layout of a sum", fix="use the same version of fedfuse everywhere") from None
        return cls(parts)

    @property
    def size(self) -> int:
        """How many numbers are added up."""
        return sum(part.size for part in self.parts)

    def _places(self) -> Iterator[tuple[SumPart, slice]]:
        start = 0
        for part in self.parts:
            yield part, slice(start, start + part.size)
            start += part.size

    def encode(self, upload: Mapping[str, Value], point: FixedPoint) -> Codes:
        """An upload as integers. Keys that the layout does not name are left out: they do not leave the client.

        Args:
            upload: what the task gave.
            point: how numbers become integers.

        Returns:
            Shape ``(size,)``; averaged numbers are multiplied by their weights.

        Raises:
            PayloadError: a key is missing, of another kind, or beyond the range.
        """
        codes = np.empty(self.size, dtype=np.uint64)
        for part, place in self._places():
            numbers = part.numbers(upload.get(part.key))
            weights = self._weights(part, upload, point) if part.weight else None
            _check_range(part, numbers, point)
            if weights is not None:
                numbers = numbers * (weights if part.is_integer else weights.astype(np.float64))
            if not part.is_integer:
                numbers = np.rint(np.ldexp(numbers, point.num_bits)).astype(np.int64)
            codes[place] = numbers.view(np.uint64)
        return codes

    def _weights(self, part: SumPart, upload: Mapping[str, Value], point: FixedPoint) -> NDArray[Any]:
        """The weight of every number of a part."""
        weight = self._by_key[part.weight]
        found = weight.numbers(upload.get(weight.key))
        lowest, largest = (0, 0) if not len(found) else (int(found.min()), int(found.max()))
        if lowest < 0 or largest > point.settings.max_weight or (weight.kind in _SCALARS and largest < 1):
            # The server will read this: it must not say how much too large.
            raise PayloadError(
                f'"{weight.key}" is not from 1 to {point.settings.max_weight:,}, as a weight must be',
                fix=f"ask for a larger {SUMS_WHERE}.max_weight",
            )
        return _spread(found, part)

    def decode(self, total: Codes, point: FixedPoint) -> Payload:
        """The total of all clients' integers as an upload that could be the only one.

        Args:
            total: sum modulo 2^64, shape ``(size,)``.
            point: how numbers became integers.

        Returns:
            Sums, and means over the sum of their weights; a mean without any weight is 0.

        Raises:
            PayloadError: this is no total, because masks are left in it.
        """
        signed = total.view(np.int64)
        if len(signed) != self.size or (len(signed) and max(-int(signed.min()), int(signed.max())) > 2**TOTAL_BITS):
            raise PayloadError("the masked uploads do not add up", fix="ask again; a client sent something wrong")
        numbers = {part.key: signed[place] for part, place in self._places()}
        payload = Payload()
        for part, _ in self._places():
            found: NDArray[Any] = numbers[part.key]
            if not part.is_integer:
                found = np.ldexp(found.astype(np.float64), -point.num_bits)
            if part.weight:
                weights = _spread(numbers[part.weight], part).astype(np.float64)
                found = np.divide(found, weights, out=np.zeros(found.shape), where=weights > 0)
            payload[part.key] = part.value(found)
        return payload


def _spread(weights: NDArray[Any], part: SumPart) -> NDArray[Any]:
    """One weight for each number of a part, from one weight for all or one for each row."""
    return np.repeat(weights, part.size // max(1, len(weights)))


def _check_range(part: SumPart, numbers: NDArray[Any], point: FixedPoint) -> None:
    settings = point.settings
    limit: float = settings.clipping_range if part.weight else settings.clipping_range * settings.max_weight
    if part.is_integer:
        limit = point.integer_limit // settings.max_weight if part.weight else point.integer_limit
    if not len(numbers):
        return
    largest = max(-numbers.min().item(), numbers.max().item())
    if not largest <= limit:
        raise PayloadError(
            f'"{part.key}" holds a number beyond the range of the sum, which ends at {limit:,.6g}',
            fix="" if part.is_integer else f"ask for a larger {SUMS_WHERE}.clipping_range",
        )


@dataclass(frozen=True)
class Contribution:
    """What one client's part in a sum cost.

    Args:
        seconds: time that its task took.
        peak_rss_bytes: most memory that its process held during the task.
        upload_bytes: size of what it sent instead of its upload.
        upload_wire_bytes: bytes that crossed from it; 0 where nobody measured them.
        download_wire_bytes: bytes that crossed to it; 0 where nobody measured them.
    """

    seconds: float = 0.0
    peak_rss_bytes: int = 0
    upload_bytes: int = 0
    upload_wire_bytes: int = 0
    download_wire_bytes: int = 0


@dataclass(frozen=True)
class SumReply:
    """What a runtime that adds up without seeing brings back for one exchange.

    Args:
        upload: the encoded total; ``None`` if too few clients answered for the quorum.
        contributions: client id to what its part cost, of those in the total.
        missing: client id to the reason why it is not in the total.
    """

    upload: bytes | None
    contributions: Mapping[str, Contribution]
    missing: Mapping[str, str]
