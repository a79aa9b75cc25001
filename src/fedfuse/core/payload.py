"""Named tensors and scalars, and the one encoding in which they travel: safetensors.

No pickle is written or read. Encoding is deterministic: the same content gives the same bytes.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor

from fedfuse.core.errors import PayloadError
from fedfuse.core.header import MAX_HEADER_BYTES, METADATA, checked_header
from fedfuse.core.header import read_header as read_header

Scalar = bool | int | float | str
Value = Tensor | Scalar

_SCALARS = "fedfuse.scalars"
_KEY = re.compile(r"[^\x00-\x1f\x7f/*?\[\]]+(/[^\x00-\x1f\x7f/*?\[\]]+)*\Z")
_MAX_KEY_LENGTH = 512


class Payload(MutableMapping[str, Value]):
    """A mapping of ``group/name`` to a tensor or a ``bool | int | float | str``.

    Iteration is in the order of the keys, whatever the order of insertion.

    Args:
        values: initial content.

    Raises:
        PayloadError: a key or a value cannot be part of a payload.

    Example:
        >>> p = Payload({"model/w": torch.zeros(2), "num_examples": 3})
        >>> list(p), Payload.decode(p.encode())["num_examples"]
        (['model/w', 'num_examples'], 3)
    """

    def __init__(self, values: Mapping[str, Value] | None = None) -> None:
        self._values: dict[str, Value] = {}
        for key, value in (values or {}).items():
            self[key] = value

    def __getitem__(self, key: str) -> Value:
        return self._values[key]

    def __setitem__(self, key: str, value: Value) -> None:
        check_key(key)
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_quantized or value.is_complex():
                raise PayloadError(
                    f'"{key}" is a tensor of layout {value.layout} and dtype {value.dtype}',
                    fix="send dense real tensors",
                )
            value = value.detach()
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise PayloadError(f'"{key}" is an integer beyond 64 bits', fix="send it as a float or a string")
        elif isinstance(value, str) and not _is_encodable(value):
            raise PayloadError(f'"{key}" is a text that has no UTF-8', fix="leave out lone surrogates")
        elif not isinstance(value, (bool, int, float, str)):
            raise PayloadError(
                f'"{key}" is a {type(value).__name__}', fix="a payload holds tensors, bool, int, float and str only"
            )
        self._values[key] = value

    def __delitem__(self, key: str) -> None:
        del self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._values))

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Payload({len(self)} keys, {self.num_bytes} bytes)"

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors, before encoding."""
        return sum(v.numel() * v.element_size() for v in self._values.values() if isinstance(v, Tensor))

    def tensor(self, key: str) -> Tensor:
        """The tensor of that key.

        Args:
            key: full key.

        Raises:
            PayloadError: there is none, or it is a scalar.
        """
        value = self._values.get(key)
        if not isinstance(value, Tensor):
            raise PayloadError(f'the payload has no tensor "{key}"', fix=f"it has: {', '.join(self) or 'nothing'}")
        return value

    def number(self, key: str) -> float:
        """The number of that key.

        Args:
            key: full key.

        Raises:
            PayloadError: there is none, or it is not a number.
        """
        value = self._values.get(key)
        if isinstance(value, (bool, str, Tensor)) or value is None:
            raise PayloadError(f'the payload has no number "{key}"', fix=f"it has: {', '.join(self) or 'nothing'}")
        return float(value)

    def text(self, key: str) -> str:
        """The string of that key.

        Args:
            key: full key.

        Raises:
            PayloadError: there is none, or it is not a string.
        """
        value = self._values.get(key)
        if not isinstance(value, str):
            raise PayloadError(f'the payload has no string "{key}"', fix=f"it has: {', '.join(self) or 'nothing'}")
        return value

    def group(self, name: str) -> dict[str, Tensor]:
        """Tensors of one group, with the group's name taken off their keys.

        Args:
            name: the part before the slash; may hold slashes itself.

        Returns:
            Rest of the key to tensor, in key order; a state dict if one was put there.
        """
        prefix = name + "/"
        return {
            key[len(prefix) :]: value
            for key in self
            if key.startswith(prefix) and isinstance(value := self._values[key], Tensor)
        }

    def put_group(self, name: str, tensors: Mapping[str, Tensor]) -> Payload:
        """Add tensors under a group's name, for instance a state dict.

        Args:
            name: the part before the slash.
            tensors: name to tensor.

        Returns:
            This payload.
        """
        for key, tensor in tensors.items():
            self[f"{name}/{key}"] = tensor
        return self

    def encode(self) -> bytes:
        """The payload as safetensors bytes; scalars travel in the header.

        Returns:
            Bytes that :meth:`decode` turns back; the same for the same content.

        Raises:
            PayloadError: names and scalars are too long to be read again.
        """
        scalars: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for key in self:
            value = self._values[key]
            if isinstance(value, Tensor):
                # Tensors that share memory are refused by the format, and a copy on the CPU is what travels.
                tensors[key] = value.to("cpu", memory_format=torch.contiguous_format, copy=True)
            else:
                scalars[key] = _scalar_to_json(value)
        data = safetensors_save(tensors, {_SCALARS: json.dumps(scalars, sort_keys=True, separators=(",", ":"))})
        header_bytes = int.from_bytes(data[:8], "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise PayloadError(
                f"names and scalars take {header_bytes:,} bytes, more than {MAX_HEADER_BYTES:,}",
                fix="send long texts and many numbers as tensors",
            )
        return data

    @classmethod
    def decode(cls, data: bytes) -> Payload:
        """Turn bytes into a payload.

        Args:
            data: what :meth:`encode` gave; any other bytes end in an error.

        Returns:
            The payload; its tensors own their memory.

        Raises:
            PayloadError: the bytes are not a payload.
        """
        header = checked_header(data)
        try:
            tensors = safetensors_load(data)
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError, AttributeError) as error:
            raise PayloadError(
                f"the bytes are not a payload: {error}", fix="send what Payload.encode() gives"
            ) from None
        payload = cls()
        for key in list(tensors):
            tensor = tensors.pop(key)
            if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
                raise PayloadError(f'"{key}" holds bytes that are no bool', fix="send what Payload.encode() gives")
            payload[key] = tensor.clone()
        for key, scalar in _scalars(header).items():
            if key in payload:
                raise _twice(key)
            payload[key] = scalar
        return payload

    def digest(self) -> str:
        """SHA-256 of the encoding, 64 hexadecimal digits."""
        return hashlib.sha256(self.encode()).hexdigest()


def check_key(key: str) -> None:
    """Refuse a key that no payload may have.

    Args:
        key: ``name`` or ``group/name``, printable, without ``* ? [ ]``.

    Raises:
        PayloadError: it is none.
    """
    # The format keeps one name of its header for itself, and all names as UTF-8.
    is_key = isinstance(key, str) and len(key) <= _MAX_KEY_LENGTH and _KEY.match(key) and key != METADATA
    if not is_key or not _is_encodable(key):
        raise PayloadError(
            f"{key!r:.80} is no key of a payload",
            fix=f'use "group/name": printable, at most {_MAX_KEY_LENGTH} characters, no * ? [ ] and no empty part',
        )


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _twice(key: str) -> PayloadError:
    return PayloadError(f'"{key}" stands twice in the payload', fix="send what Payload.encode() gives")


def matches(key: str, patterns: Iterable[str]) -> bool:
    """Whether a key is covered by a declaration.

    Args:
        key: a payload's key.
        patterns: keys, or prefixes that end in ``/*``.

    Example:
        >>> matches("block/0.weight", ["block/*", "num_examples"]), matches("blocks", ["block/*"])
        (True, False)
    """
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def _scalars(header: Mapping[str, Any]) -> dict[str, Scalar]:
    metadata = header.get(METADATA) or {}
    try:
        found = json.loads(metadata.get(_SCALARS, "{}"))
        return {key: _scalar_from_json(value) for key, value in found.items()}
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        raise PayloadError(
            "the bytes are not a payload: its scalars are broken", fix="send what Payload.encode() gives"
        ) from None


def _scalar_to_json(value: Scalar) -> Any:
    # JSON has no NaN and no infinity; they travel as tagged strings so that no reader needs an extension of JSON.
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return value


def _scalar_from_json(value: Any) -> Scalar:
    if isinstance(value, dict) and set(value) == {"float"}:
        return float(value["float"])
    if isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(value)


class PayloadFile(Mapping[str, Value]):
    """A payload in a file, read lazily: only what is asked for comes into memory.

    Args:
        path: file that holds an encoded payload.

    Raises:
        PayloadError: the file is no payload.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            header = checked_header(self.path)
            # A payload of the scalars, because it judges them.
            self._scalars = Payload(_scalars(header))
            self._tensors = {key for key in header if key != METADATA}
            for key in self._tensors:
                check_key(key)
                if key in self._scalars:
                    raise _twice(key)
        except PayloadError as error:
            raise PayloadError(error.what, where=str(self.path), fix=error.fix) from None

    def __getitem__(self, key: str) -> Value:
        if key in self._scalars:
            return self._scalars[key]
        if key not in self._tensors:
            raise KeyError(key)
        # The file is opened per tensor: mapped pages of many open files would count into the process's memory.
        try:
            with safe_open(self.path, framework="pt") as file:
                return file.get_tensor(key)  # type: ignore[no-any-return]
        except SafetensorError as error:
            raise PayloadError(f"the file is not a payload: {error}", where=str(self.path)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._scalars, *self._tensors}))

    def __len__(self) -> int:
        return len(self._scalars) + len(self._tensors)
