"""What a fusion rule is, and how it is run over uploads with flat memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedfuse.core.errors import ModelError
from fedfuse.core.payload import Value

_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Base of all rules that fuse every element on its own."""

    def fuse(self, stack: Tensor, weights: Tensor) -> Tensor:
        """Fuse one chunk of one tensor.

        Args:
            stack: the clients' values, shape ``(num_clients, n)``, float64.
            weights: shape ``(num_clients,)``, float64, sums to 1.

        Returns:
            Shape ``(n,)``, float64.
        """
        raise NotImplementedError


def fuse_uploads(
    uploads: Sequence[Mapping[str, Value]],
    rule: Rule,
    weights: Sequence[float] | None = None,
    *,
    group: str = "model",
) -> dict[str, Tensor]:
    """Fuse the tensors of a group over clients, key by key and chunk by chunk.

    From each upload only the chunk at hand is in memory, so memory does not grow with the number of clients.

    Args:
        uploads: opened lazily, one per client, in client-id order.
        rule: how to fuse.
        weights: one per client, not negative; equal if left out.
        group: only keys of this group; it is taken off the names.

    Returns:
        Name to fused tensor, with the uploads' own dtypes; integers are rounded.

    Raises:
        ModelError: no uploads, weights that cannot be, or uploads whose keys, shapes or dtypes differ.
    """
    if not uploads:
        raise ModelError("there is nothing to fuse", fix="give at least one upload")
    shares = torch.tensor([1.0] * len(uploads) if weights is None else list(weights), dtype=torch.float64)
    if len(shares) != len(uploads) or bool((shares < 0).any()) or not 0 < float(shares.sum()) < math.inf:
        raise ModelError(
            f"{len(shares)} weights for {len(uploads)} uploads: {shares.tolist()}",
            fix="give one weight per upload, none negative, not all zero",
        )
    shares = shares / shares.sum()
    prefix = f"{group}/" if group else ""
    keys = [key for key in uploads[0] if key.startswith(prefix)]
    fused: dict[str, Tensor] = {}
    for key in keys:
        first = _tensor(uploads[0], key)
        if first is None:
            continue
        fused[key.removeprefix(prefix)] = _fuse_key(uploads, key, first, rule, shares)
    for position, upload in enumerate(uploads):
        extra = sorted({key for key in upload if key.startswith(prefix)} ^ set(keys))
        if extra:
            raise ModelError(
                f'upload {position} and upload 0 do not both hold "{extra[0]}"',
                fix="fuse uploads of the same architecture",
            )
    return fused


def _fuse_key(uploads: Sequence[Mapping[str, Value]], key: str, first: Tensor, rule: Rule, shares: Tensor) -> Tensor:
    result = torch.empty_like(first, memory_format=torch.contiguous_format)
    flat = result.view(-1)
    step = max(1, _CHUNK_BYTES // (8 * len(uploads)))
    # An empty tensor has one empty chunk, so that the others are compared with it too.
    for start in range(0, max(1, flat.numel()), step):
        rows = [_chunk(upload, key, first, position, start, start + step) for position, upload in enumerate(uploads)]
        value = rule.fuse(torch.stack(rows), shares)
        flat[start : start + step] = value if first.is_floating_point() else value.round().to(first.dtype)
    return result


def _chunk(upload: Mapping[str, Value], key: str, first: Tensor, position: int, start: int, stop: int) -> Tensor:
    tensor = _tensor(upload, key)
    if tensor is None or tensor.shape != first.shape or tensor.dtype != first.dtype:
        found = "nothing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
        raise ModelError(
            f'upload {position} has {found} as "{key}", upload 0 has {tuple(first.shape)} {first.dtype}',
            fix="fuse uploads of the same architecture",
        )
    return tensor.reshape(-1)[start:stop].double()


def _tensor(upload: Mapping[str, Value], key: str) -> Tensor | None:
    try:
        value = upload[key]
    except KeyError:
        return None
    return value if isinstance(value, Tensor) else None
