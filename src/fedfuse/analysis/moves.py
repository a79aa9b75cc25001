"""How far, and in which direction, each client went in one exchange; read part by part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedfuse.rules.reading import Upload

_PART_BYTES = 4 << 20
_FEWEST_ELEMENTS = 1 << 10
# Directions are compared with so many others, so that time does not grow with the square of the number of clients.
_MOST_PEERS = 64


@dataclass(frozen=True)
class Moves:
    """What clients changed, in numbers.

    Args:
        norms: length of each client's change, shape ``(num_clients,)``.
        cosines: how far each client's direction is that of the others: over these the median, and over tensors the
            mean, of the cosine. NaN for a client that did not move.
        affinities: how much each client has in common with the others: the mean square of the cosines, each times the
            square root of its tensor's number of elements. About 1 for noise, whatever the model.
    """

    norms: Tensor
    cosines: Tensor
    affinities: Tensor


def measure_moves(uploads: Sequence[Upload], starts: Sequence[Mapping[str, Tensor]], keys: Sequence[str]) -> Moves:
    """Measure the changes of clients whose tensors look alike.

    From each upload only one part is in memory, so memory does not grow with the number of clients. Directions are
    those of single tensors: else the last layer, where label skew is strongest, would drown all others.

    Args:
        uploads: one per client.
        starts: per client, full key to where it began; what is not there began at zero.
        keys: full keys of floating-point tensors that all uploads hold in the same shape and dtype.

    Returns:
        The measures.
    """
    num_clients = len(uploads)
    peers = torch.linspace(0, num_clients - 1, min(num_clients, _MOST_PEERS)).round().long()
    squares = torch.zeros(num_clients, dtype=torch.float64)
    cosines = torch.zeros(num_clients, len(peers), dtype=torch.float64)
    strengths, counts = torch.zeros_like(cosines), torch.zeros_like(cosines)
    for key in keys:
        inner, own, num_elements = torch.zeros_like(cosines), torch.zeros_like(squares), 0
        for rows in _parts(uploads, starts, key):
            inner += rows @ rows[peers].T
            own += rows.square().sum(1)
            num_elements += rows.shape[1]
        product = own.sqrt()[:, None] * own[peers].sqrt()
        moved = product > 0
        cosine = torch.where(moved, inner / product, 0.0)
        squares += own
        cosines += cosine
        strengths += num_elements * cosine.square()
        counts += moved
    is_itself = peers == torch.arange(num_clients)[:, None]
    none = torch.full_like(cosines, torch.nan)
    known = (counts > 0) & ~is_itself
    return Moves(
        squares.sqrt(),
        torch.where(known, cosines / counts, none).nanmedian(1).values,
        torch.where(known, strengths / counts, none).nanmean(1),
    )


def _parts(uploads: Sequence[Upload], starts: Sequence[Mapping[str, Tensor]], key: str) -> Iterator[Tensor]:
    """The clients' changes of one tensor, shape ``(num_clients, n)`` each."""
    looks = uploads[0].looks(key)
    assert looks is not None
    length, step = torch.Size(looks[0]).numel(), max(_FEWEST_ELEMENTS, _PART_BYTES // (8 * len(uploads)))
    for begin in range(0, length, step):
        part = torch.empty(min(step, length - begin), dtype=looks[1])
        rows = torch.empty(len(uploads), len(part), dtype=torch.float64)
        for row, upload, start in zip(rows, uploads, starts, strict=True):
            row.copy_(upload.read(key, begin, part))
            if key in start:
                row -= start[key].reshape(-1)[begin : begin + len(row)]
        yield rows
