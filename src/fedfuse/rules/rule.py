"""What a fusion rule is, and how it is run over uploads with flat memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedfuse.core.errors import ModelError
from fedfuse.core.payload import Value
from fedfuse.rules.distances import squared_distances
from fedfuse.rules.reading import Upload, in_threads

_CHUNK_BYTES = 64 << 20
# Of sums: what is read and the running total together stay within a core's cache.
_SUM_ELEMENTS = 1 << 18
_MOST_OPEN = 200


@dataclass(frozen=True)
class Source:
    """Whose values a rule prepares.

    Args:
        name: of the tensor, without its group.
        position: of the client, in client-id order.
        num_clients: how many there are.
    """

    name: str
    position: int
    num_clients: int


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Base of all rules.

    A rule says how the clients' values of one tensor become one. Four facts about it decide how it is run: all of
    them are ``False`` unless a rule says otherwise.

    ``of_differences``: it sees the differences from the weights that all clients began with, and what it returns is
    added to these. ``of_whole_tensors``: it must see whole tensors, flattened, and not parts of them.
    ``is_weighted_sum``: ``fuse`` is the weighted sum of what ``prepare`` returned, so that one client at a time is
    enough. ``of_whole_models``: ``reweigh`` is first shown how far apart the clients' whole models are, and the weights
    that it returns are those of all tensors, buffers among them.

    A rule with one of the first two is made for weights: integers and a model's buffers are averaged instead.
    """

    of_differences: ClassVar[bool] = False
    of_whole_tensors: ClassVar[bool] = False
    of_whole_models: ClassVar[bool] = False

    @property
    def is_weighted_sum(self) -> bool:
        """Whether clients can be added up one by one."""
        return False

    def prepare(self, values: Tensor, source: Source) -> Tensor:
        """Change one client's values before they meet the others'.

        Args:
            values: shape ``(n,)``, float64; not to be changed in place.
            source: whose they are.

        Returns:
            Shape ``(n,)``, float64.
        """
        return values

    def reweigh(self, distances: Tensor, weights: Tensor) -> Tensor:
        """Change the clients' weights by what their whole models look like.

        Args:
            distances: squared distances between the models, shape ``(num_clients, num_clients)``, float64.
            weights: shape ``(num_clients,)``, float64, sums to 1.

        Returns:
            Shape ``(num_clients,)``, float64, sums to 1.
        """
        return weights

    def fuse(self, stack: Tensor, weights: Tensor) -> Tensor:
        """Fuse one chunk of one tensor, or the whole of it.

        Args:
            stack: the clients' prepared values, shape ``(num_clients, n)``, float64.
            weights: shape ``(num_clients,)``, float64, sums to 1.

        Returns:
            Shape ``(n,)``, float64.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class _Mean(Rule):
    """What integers and buffers get under the rules for weights."""

    @property
    def is_weighted_sum(self) -> bool:
        return True


def fuse_uploads(
    uploads: Sequence[Mapping[str, Value]],
    rule: Rule,
    weights: Sequence[float] | None = None,
    *,
    group: str = "model",
    base: Mapping[str, Value] | None = None,
    buffers: Collection[str] = (),
) -> dict[str, Tensor]:
    """Fuse the tensors of a group over clients, key by key and chunk by chunk.

    From each upload only the chunk at hand is in memory, so memory does not grow with the number of clients; rules
    that need whole tensors of all clients hold one tensor of each. Rules of whole models read the uploads twice.

    Args:
        uploads: opened lazily, one per client, in client-id order.
        rule: how to fuse.
        weights: one per client, not negative; equal if left out.
        group: only keys of this group; it is taken off the names.
        base: name to tensor: the weights that all clients began with, for rules that fuse differences from them.
        buffers: names of tensors that are no weights, such as running statistics; rules for weights average them.

    Returns:
        Name to fused tensor, with the uploads' own dtypes; integers are rounded.
    """
    return dict(stream_fused(uploads, rule, weights, group=group, base=base, buffers=buffers))


def stream_fused(
    uploads: Sequence[Mapping[str, Value]],
    rule: Rule,
    weights: Sequence[float] | None = None,
    *,
    group: str = "model",
    base: Mapping[str, Value] | None = None,
    buffers: Collection[str] = (),
    order: Sequence[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Fuse like :func:`fuse_uploads`, and hand out each tensor as soon as it is fused.

    Args:
        uploads: opened lazily, one per client, in client-id order.
        rule: how to fuse.
        weights: one per client, not negative; equal if left out.
        group: only keys of this group; it is taken off the names.
        base: name to tensor: the weights that all clients began with, for rules that fuse differences from them.
        buffers: names of tensors that are no weights, such as running statistics; rules for weights average them.
        order: all full keys of that group in the order that is wanted; the first upload's if left out.

    Yields:
        Name and fused tensor.

    Raises:
        ModelError: no uploads, weights that cannot be, no base where one is needed, or uploads whose keys, shapes or
            dtypes differ.
    """
    if not uploads:
        raise ModelError("there is nothing to fuse", fix="give at least one upload")
    shares = torch.tensor([1.0] * len(uploads) if weights is None else list(weights), dtype=torch.float64)
    if len(shares) != len(uploads) or bool((shares < 0).any()) or not 0 < float(shares.sum()) < math.inf:
        raise ModelError(
            f"{len(shares)} weights for {len(uploads)} uploads: {shares.tolist()}",
            fix="give one weight per upload, none negative, not all zero",
        )
    if rule.of_differences and base is None:
        raise ModelError(
            f"{type(rule).__name__} fuses differences from the weights that all clients began with, and there are none",
            fix="give these weights as base, or use another rule",
        )
    shares = shares / shares.sum()
    prefix = f"{group}/" if group else ""
    keys = list(order) if order is not None else [key for key in uploads[0] if key.startswith(prefix)]
    sources = [Upload(upload, stays_open=len(uploads) <= _MOST_OPEN) for upload in uploads]
    try:
        _check_keys(sources, keys, prefix)
        if rule.of_whole_models:
            shares = rule.reweigh(squared_distances(sources, keys), shares)
        yield from _fuse_keys(sources, keys, prefix, rule, shares, base, buffers)
    finally:
        for source in sources:
            source.close()


def _fuse_keys(
    sources: Sequence[Upload],
    keys: Sequence[str],
    prefix: str,
    rule: Rule,
    shares: Tensor,
    base: Mapping[str, Value] | None,
    buffers: Collection[str],
) -> Iterator[tuple[str, Tensor]]:
    for key in keys:
        looks = sources[0].looks(key)
        if looks is None:
            continue
        name = key.removeprefix(prefix)
        is_weight = looks[1].is_floating_point and name not in buffers
        fitting = rule if is_weight or not (rule.of_differences or rule.of_whole_tensors) else _Mean()
        start = None
        if fitting.of_differences and base is not None:
            value = base.get(name)
            start = value if isinstance(value, Tensor) else None
            _check(None if start is None else (tuple(start.shape), looks[1]), "the base", f'"{name}"', looks)
        yield name, _Key(sources, key, name, looks, start).fuse(fitting, shares)


Looks = tuple[tuple[int, ...], torch.dtype]


def _check_keys(sources: Sequence[Upload], keys: Sequence[str], prefix: str) -> None:
    """Refuse uploads that do not look alike, before any tensor is read."""
    for key in keys:
        looks = sources[0].looks(key)
        if looks is not None:
            for position, source in enumerate(sources):
                _check(source.looks(key), f"upload {position}", f'"{key}"', looks)
    for position, source in enumerate(sources):
        extra = sorted({key for key in source.values if key.startswith(prefix)} ^ set(keys))
        if extra:
            raise ModelError(
                f'upload {position} and upload 0 do not both hold "{extra[0]}"',
                fix="fuse uploads of the same architecture",
            )


def _check(found: Looks | None, whose: str, key: str, wanted: Looks) -> None:
    if found != wanted:
        shown = "nothing" if found is None else f"{found[0]} {found[1]}"
        raise ModelError(
            f"{whose} has {shown} as {key}, upload 0 has {wanted[0]} {wanted[1]}",
            fix="fuse uploads of the same architecture",
        )


@dataclass(frozen=True)
class _Key:
    """One tensor of all clients."""

    sources: Sequence[Upload]
    key: str
    name: str
    looks: Looks
    base: Tensor | None

    def fuse(self, rule: Rule, shares: Tensor) -> Tensor:
        result = torch.empty(self.looks[0], dtype=self.looks[1])
        if rule.is_weighted_sum:
            self._sum(rule, shares, result.view(-1))
        else:
            self._stack(rule, shares, result.view(-1))
        return result

    def _stack(self, rule: Rule, shares: Tensor, result: Tensor) -> None:
        """All clients at a time, as many elements as memory allows."""
        step = len(result) if rule.of_whole_tensors else max(1, _CHUNK_BYTES // (8 * len(self.sources)))
        for target, start in _parts(result, step):
            part = torch.empty_like(target)
            stack = torch.empty(len(self.sources), len(target), dtype=torch.float64)
            for position, source in enumerate(self.sources):
                stack[position] = self._prepared(rule, position, start, source.read(self.key, start, part).double())
            self._put(target, start, rule.fuse(stack, shares))

    def _sum(self, rule: Rule, shares: Tensor, result: Tensor) -> None:
        """One client at a time, and several parts at a time where there are files to be read."""
        step = len(result) if rule.of_whole_tensors else min(_SUM_ELEMENTS, max(1, _CHUNK_BYTES // 8))
        memory = threading.local()

        def put_sum(where: tuple[Tensor, int]) -> None:
            target, start = where
            if not hasattr(memory, "part"):
                memory.part = torch.empty(min(step, len(result)), dtype=result.dtype)
                memory.wide = torch.empty(min(step, len(result)), dtype=torch.float64)
                memory.total = torch.empty_like(memory.wide)
            part, wide, total = (m[: len(target)] for m in (memory.part, memory.wide, memory.total))
            total.zero_()
            for position, (source, share) in enumerate(zip(self.sources, shares.tolist(), strict=True)):
                if share == 0:
                    # Not even read: zero times NaN is no zero.
                    continue
                row = source.read(self.key, start, part)
                total.add_(self._prepared(rule, position, start, wide.copy_(row)), alpha=share)
            self._put(target, start, total)

        parts = _parts(result, step)
        is_worth_it = len(parts) > 1 and any(source.is_file for source in self.sources)
        in_threads(put_sum, parts, torch.get_num_threads() if is_worth_it else 1)

    def _put(self, target: Tensor, start: int, value: Tensor) -> None:
        if self.base is not None:
            value = value + self._base(start, len(value))
        target.copy_(value if target.is_floating_point() else value.round())

    def _prepared(self, rule: Rule, position: int, start: int, values: Tensor) -> Tensor:
        if self.base is not None:
            values = values - self._base(start, len(values))
        return rule.prepare(values, Source(self.name, position, len(self.sources)))

    def _base(self, start: int, length: int) -> Tensor:
        assert self.base is not None
        return self.base.reshape(-1)[start : start + length]


def _parts(result: Tensor, step: int) -> list[tuple[Tensor, int]]:
    """Views of a flat tensor, and where they start."""
    return [(result[start : start + step], start) for start in range(0, len(result), max(1, step))]
