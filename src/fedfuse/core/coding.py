"""Uploads in fewer bytes: what a client does before it sends, and how the server reads what came.

A coded tensor travels as parts under ``coded/PART/KEY`` instead of ``KEY``. Where both sides know what it began as, the
parts tell its change; else ``coded/layout`` tells shape and dtype. Whatever is not coded travels as it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedfuse.core.codecs.codec import Codec
from fedfuse.core.errors import ConfigError, PayloadError, TaskError
from fedfuse.core.known import STATISTICS, Known
from fedfuse.core.payload import Payload, Value, check_key, matches
from fedfuse.core.registry import CODECS
from fedfuse.core.release import CURVES
from fedfuse.core.seeding import Rng
from fedfuse.core.settings import from_json, to_json

NO_CODEC = "none"
_CODED = "coded/"
_LAYOUT = "coded/layout"
_FIX = "send what the client's side of fedfuse makes"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPES = {str(kind).removeprefix("torch."): kind for kind in _FLOATS}
_MAX_DIMENSIONS = 64


def codec_terms(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """The section ``upload`` with its defaults: what clients are told.

    Args:
        settings: ``codec`` and the settings of that codec.

    Returns:
        JSON; empty where uploads travel as they are.

    Raises:
        ConfigError: a setting is unknown or wrong.
        RegistryError: there is no such codec.
    """
    others = dict(settings or {})
    name = others.pop("codec", NO_CODEC)
    if not isinstance(name, str):
        raise ConfigError(
            f"this is no codec: {name!r:.60}",
            where="upload.codec",
            fix=f"known: {', '.join([NO_CODEC, *CODECS.names()])}",
        )
    if name == NO_CODEC:
        if others:
            raise ConfigError(
                f'the setting "{next(iter(others))}" has no codec',
                where="upload",
                fix=f"name one in upload.codec: {', '.join(CODECS.names())}",
            )
        return {}
    return {"codec": name, **to_json(from_json(CODECS.get(name), others, where="upload"))}


def codec_of(terms: Mapping[str, Any]) -> Codec:
    """The codec that clients were told of.

    Args:
        terms: as :func:`codec_terms` gives them, not empty.
    """
    others = {name: value for name, value in terms.items() if name != "codec"}
    codec: Codec = from_json(CODECS.get(terms["codec"]), others, where="upload")
    return codec


def check_codec(terms: Mapping[str, Any], mechanism: str | None) -> None:
    """Refuse a codec beside something that it would break.

    Args:
        terms: as :func:`codec_terms` gives them.
        mechanism: of differential privacy; ``None`` is none.

    Raises:
        ConfigError: the noise of a mean is made for clipped uploads, and a code may be longer than what it says.
    """
    if terms and mechanism == "central":
        raise ConfigError(
            "the noise of the mean is made for uploads as they were clipped, and a codec changes them after that",
            where="upload.codec",
            fix="use privacy.mechanism: local, whose noise is there before the codec, or leave the codec out",
        )


def plain_key(key: str) -> str:
    """The key of the tensor that an entry of an encoded upload is a part of.

    Args:
        key: of the entry.

    Example:
        >>> plain_key("coded/steps/model/head.weight"), plain_key("num_examples")
        ('model/head.weight', 'num_examples')
    """
    words = key.split("/", 2)
    return words[2] if key.startswith(_CODED) and len(words) == 3 else key


@dataclass(frozen=True)
class Coding:
    """A codec at work on the answers to one question.

    Args:
        codec: says tensors in fewer bytes.
        known: what both sides know.
    """

    codec: Codec
    known: Known

    def encode(self, upload: Payload, unsent: Payload, rng: Rng) -> tuple[Payload, Payload]:
        """What a client sends instead of an upload.

        Args:
            upload: left as it is.
            unsent: what the codes of its last answer to the same task left out, by key; may be empty.
            rng: the client's source.

        Returns:
            What is sent, and what that leaves out.

        Raises:
            TaskError: the upload has keys of codes already.
        """
        sent, left, layout = Payload(), Payload(), {}
        for key, value in upload.items():
            if key.startswith(_CODED):
                raise TaskError(f'the upload holds "{key}", a name of codes', where="upload", fix="rename the group")
            parts, rest = self._code(key, value, unsent.get(key), rng) if self._is_coded(key, value) else (None, None)
            if parts is None:
                sent[key] = value
                continue
            assert isinstance(value, Tensor)
            for name, tensor in parts.items():
                sent[f"{_CODED}{name}/{key}"] = tensor
            if self.known.start_of(key, value) is None:
                layout[key] = [str(value.dtype).removeprefix("torch."), list(value.shape)]
            elif self.codec.keeps_unsent and rest is not None:
                left[key] = rest.float()
        if layout:
            sent[_LAYOUT] = json.dumps(layout, sort_keys=True, separators=(",", ":"))
        return sent, left

    def open(self, sent: Mapping[str, Value]) -> Opened:
        """What an upload says, each tensor made when it is looked at.

        Args:
            sent: what :meth:`encode` made; may come from anybody.

        Raises:
            PayloadError: it is no coded upload.
        """
        return Opened(self, sent)

    def _is_coded(self, key: str, value: Value) -> bool:
        """Whether a value is worth a code."""
        if not (isinstance(value, Tensor) and value.dtype in _FLOATS):
            return False
        if value.numel() < self.codec.min_entries or not matches(key, self.codec.keys or ("*",)):
            return False
        return not (matches(key, CURVES) or key.endswith(STATISTICS)) and bool(value.isfinite().all())

    def _code(
        self, key: str, value: Value, owed: Value | None, rng: Rng
    ) -> tuple[dict[str, Tensor] | None, Tensor | None]:
        """The parts of a code and what it leaves out; no parts where there is no need of one or none is possible."""
        assert isinstance(value, Tensor)
        start, wanted = self.known.start_of(key, value), value.detach().cpu().double()
        if start is None and not self.codec.keys:
            return None, None
        # What is no change of anything has nothing to do with an earlier tensor of the same key.
        if start is not None and isinstance(owed, Tensor) and owed.shape == wanted.shape:
            wanted = wanted + owed.double()
        begin = torch.zeros_like(wanted) if start is None else start.detach().cpu().double()
        parts = self.codec.encode(wanted - begin, value.dtype, rng.torch("codec", key))
        rest = wanted - (begin + self.codec.decode(parts, tuple(wanted.shape))).to(value.dtype).double()
        pays = sum(p.numel() * p.element_size() for p in parts.values()) < value.numel() * value.element_size()
        return (parts if pays and bool(rest.isfinite().all()) else None), rest


class Opened(Mapping[str, Value]):
    """An upload under its own keys, whatever of it was coded.

    Args:
        coding: how it was coded.
        sent: what came; may be anything.

    Raises:
        PayloadError: it is no coded upload.
    """

    def __init__(self, coding: Coding, sent: Mapping[str, Value]) -> None:
        self._coding, self._sent = coding, sent
        self._parts: dict[str, dict[str, str]] = {}
        for key in sent:
            words = key.split("/", 2)
            if key.startswith(_CODED) and key != _LAYOUT:
                if len(words) < 3:
                    raise PayloadError(f'"{key}" is no part of a code', fix=_FIX)
                self._parts.setdefault(words[2], {})[words[1]] = key
        self._layout = _layout(sent.get(_LAYOUT, "{}"))
        for key in self._layout:
            if key not in self._parts:
                raise PayloadError(f'the layout names "{key:.80}", which has no code', fix=_FIX)
        self._looks = {key: self._look(key) for key in self._parts}
        # Fusion rules read a tensor in parts: it is made once for all of them.
        self._last: tuple[str, Tensor] = "", torch.empty(0)

    def __getitem__(self, key: str) -> Value:
        if key not in self._parts:
            if key.startswith(_CODED):
                raise KeyError(key)
            return self._sent[key]
        if self._last[0] == key:
            return self._last[1]
        (dtype, shape), parts = self._looks[key], {}
        for name, place in self._parts[key].items():
            tensor = self._sent[place]
            if not isinstance(tensor, Tensor):
                raise PayloadError(f'the {name} of "{key}" is no tensor', fix=_FIX)
            parts[name] = tensor
        change = self._coding.codec.decode(parts, shape)
        start = None if key in self._layout else self._coding.known.start(key)
        value = (change if start is None else start.detach().cpu().double() + change).to(dtype)
        self._last = key, value
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._parts, *(key for key in self._sent if not key.startswith(_CODED))}))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def num_bytes(self) -> int:
        """Bytes of the coded tensors once they are made; told before any is."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self._looks.values())

    def _look(self, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a coded tensor."""
        check_key(key)
        if key in self._sent:
            raise PayloadError(f'"{key}" comes both as it is and coded', fix=_FIX)
        if key in self._layout:
            return self._layout[key]
        start = self._coding.known.start(key)
        if start is None or start.dtype not in _FLOATS:
            raise PayloadError(f'"{key}" is a change of nothing that is known', fix=_FIX)
        return start.dtype, tuple(start.shape)


def _layout(text: Value) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtypes and shapes that somebody tells."""
    try:
        table = json.loads(text) if isinstance(text, str) else None
        found = {}
        for key, (kind, sizes) in table.items():  # type: ignore[union-attr]
            if not all(type(size) is int and 0 <= size < 1 << 63 for size in sizes) or len(sizes) > _MAX_DIMENSIONS:
                raise ValueError(sizes)
            if math.prod(size or 1 for size in sizes) >= 1 << 60:
                raise ValueError(sizes)
            found[key] = (_DTYPES[kind], tuple(sizes))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise PayloadError("its layout is broken", fix=_FIX) from None
    return found
