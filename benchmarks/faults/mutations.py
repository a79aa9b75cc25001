"""Hostile bytes: valid encodings that something was done to, in the header, in the lengths or anywhere."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fedfuse.core.payload import Payload
from fedfuse.core.sealing import SigningKey, seal

NUMBERS = [
    *(0, 1, -1, 2, 4, 63, 64, 65, 255, 4096, 2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**61, 2**62, 2**63 - 1),
    *(2**63, 2**64 - 1, 2**64, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
]
WORDS = [
    *("", "F32", "F64", "BF16", "I64", "U8", "BOOL", "C64", "F4", "F8_E4M3", "F8_E8M0", "U64", "float", "NaN", "a/*"),
    *("__metadata__", "fedfuse.scalars", "../x", "a//b", "\x00", "\ud800", "é", "k" * 600, "[" * 50, "{}", "1e999"),
]
KEY = SigningKey.generate()


def valid() -> list[bytes]:
    """Encodings that every decoder accepts; all mutations begin with one of them."""
    dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.uint16, torch.float64)
    mixed = Payload({f"w/{i}": torch.ones(i, 2).to(dtype) for i, dtype in enumerate(dtypes)})
    mixed.update({"n": 3, "x": 0.5, "nan": float("nan"), "text": "hé", "on": True, "empty": torch.zeros(0, 3)})
    sealed = seal({"client": "a", "answer_key": "0" * 40, "seconds": 1.0}, {"upload": mixed.encode(), "none": b""}, KEY)
    small = Payload({"w": torch.zeros(()), "curve/loss": torch.ones(3)})
    return [Payload().encode(), mixed.encode(), small.encode(), sealed]


def joined(header: Any, body: bytes, length: int | None = None) -> bytes:
    """Put bytes together as a payload is.

    Args:
        header: text as bytes, or JSON.
        body: what stands behind the header.
        length: what is said to be the header's length; the true one if left out.
    """
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def parted(data: bytes) -> tuple[Any, bytes]:
    """Header and body of bytes, as far as they have them.

    Args:
        data: any bytes.

    Returns:
        The header as JSON, or an empty one where there is none.
    """
    length = int.from_bytes(data[:8], "little")
    try:
        return json.loads(data[8 : 8 + length]), data[8 + length :]
    except (ValueError, RecursionError):
        return {}, data[8:]


class Mutator:
    """Makes hostile bytes.

    Args:
        seed: of its choices.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._seeds = valid()

    def fresh(self) -> bytes:
        """A mutation of a valid encoding."""
        return self.mutated(self.random.choice(self._seeds))

    def mutated(self, data: bytes) -> bytes:
        """Something done to bytes, once to four times.

        Args:
            data: any bytes, at best a valid encoding.
        """
        for _ in range(self.random.randint(1, 4)):
            try:
                data = self.random.choice(self._ways())(data)
            except RecursionError:
                pass  # it is nested so deeply already that the mutator itself cannot walk through it
        return data

    def _ways(self) -> list[Callable[[bytes], bytes]]:
        structured = [self._header, self._header, self._header, self._tensor, self._tensor, self._scalars]
        return [*structured, self._bytes, self._length, self._cut, self._twice, self._deep, self._signed]

    def _value(self, depth: int = 0) -> Any:
        kind = self.random.randrange(6 if depth < 3 else 4)
        if kind < 2:
            return self.random.choice(NUMBERS)
        if kind == 2:
            return self.random.choice(WORDS)
        if kind == 3:
            return self.random.choice([None, True, False])
        if kind == 4:
            return [self._value(depth + 1) for _ in range(self.random.choice([0, 1, 2, 3, 70]))]
        return {self.random.choice(WORDS): self._value(depth + 1) for _ in range(self.random.randrange(3))}

    def _places(self, value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
        """Every (container, key) inside a table."""
        pairs = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        for key, inner in pairs:
            found.append((value, key))
            if isinstance(inner, (dict, list)):
                self._places(inner, found)
        return found

    def _header(self, data: bytes) -> bytes:
        header, body = parted(data)
        places = self._places(header, []) if isinstance(header, (dict, list)) else []
        if not places:
            return joined(self._value(), body)
        container, key = self.random.choice(places)
        way = self.random.randrange(4)
        if way == 0:
            del container[key]
        elif way == 1 and isinstance(container, dict):
            container[self.random.choice(WORDS)] = container[key]
        elif way == 2 and isinstance(container[key], int):
            container[key] += self.random.choice([-8, -4, -1, 1, 4, 8])
        else:
            container[key] = self._value()
        return joined(header, body)

    def _tensor(self, data: bytes) -> bytes:
        """A tensor more, whose claims fit each other more often than chance would make them."""
        header, body = parted(data)
        if not isinstance(header, Mapping):
            return data
        shape: list[Any] = [
            self.random.choice([0, 1, 1, 2, 2**31, 2**40, 2**62, -1, True, 1.5, "2"])
            for _ in range(self.random.choice([0, 1, 2, 3, 64, 65, 300]))
        ]
        num_bytes = self.random.choice([0, 0, 1, 4, 8, 16])
        entry = {
            "dtype": self.random.choice(WORDS),
            "shape": shape,
            "data_offsets": [len(body), len(body) + num_bytes],
        }
        key = self.random.choice(["new", "w/0", "curve/x", *WORDS])
        fill = self.random.choice([b"\0", b"\x02", b"\xff", b"\x7f"])
        return joined({**header, key: entry}, body + fill * num_bytes)

    def _scalars(self, data: bytes) -> bytes:
        header, body = parted(data)
        if not isinstance(header, Mapping):
            return data
        text = json.dumps(self._value())
        if self.random.random() < 0.6:
            text = json.dumps({self.random.choice(WORDS): self._value(2) for _ in range(3)})
        if self.random.random() < 0.2:
            text = self.random.choice(["[" * 3000, '{"a":' * 3000, "9" * 5000, '{"a":1,"a":2}', text[:-1]])
        return joined({**header, "__metadata__": {"fedfuse.scalars": text}}, body)

    def _bytes(self, data: bytes) -> bytes:
        changed = bytearray(data or b"\0")
        for _ in range(self.random.choice([1, 1, 2, 8])):
            changed[self.random.randrange(len(changed))] = self.random.randrange(256)
        return bytes(changed)

    def _length(self, data: bytes) -> bytes:
        true = int.from_bytes(data[:8], "little")
        wrong = self.random.choice(
            [0, 1, true - 1, true + 1, len(data), len(data) - 8, 2**24, 2**24 + 1, 2**63, 2**64 - 1]
        )
        return (wrong % 2**64).to_bytes(8, "little") + data[8:]

    def _cut(self, data: bytes) -> bytes:
        return data[: self.random.randrange(len(data) + 1)]

    def _twice(self, data: bytes) -> bytes:
        header, body = parted(data)
        if not isinstance(header, Mapping) or not header:
            return data + data
        name = self.random.choice(sorted(header))
        text = json.dumps(header).encode("utf-8", "surrogatepass")
        again = json.dumps({name: header[name]}).encode("utf-8", "surrogatepass")
        return joined(text[:-1] + b"," + again[1:], body)

    def _deep(self, data: bytes) -> bytes:
        depth = self.random.choice([100, 900, 1100, 5000])
        opening, closing = self.random.choice([(b"[", b"]"), (b'{"a":', b"}")])
        return joined(b'{"w":' + opening * depth + b"1" + closing * depth + b"}", data[-8:])

    def _signed(self, data: bytes) -> bytes:
        """Whatever it is, signed by a key that anybody can make: then everything behind the signature is reached."""
        try:
            manifest = {
                "kind": "answer",
                "client_id": "a",
                "answer_key": "0" * 40,
                "has_upload": True,
                "error": "",
                "seconds": self._value(2),
                "peak_rss_bytes": self._value(2),
                "sha256": "",
                self.random.choice([*WORDS, "error", "sha256", "answer_key", "has_upload"]): self._value(1),
            }
            return seal(manifest, {self.random.choice(["upload", "b/c", "x"]): data[:4096]}, KEY)
        except Exception:
            # Not everything can be sealed; what cannot is left as it is.
            return data
