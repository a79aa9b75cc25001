"""Numbers below 2, 4 or 16 packed into bytes, and the places of a few entries in fewest bytes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedfuse.core.codecs.codec import broken, part

_PLACES = (torch.uint8, torch.int16, torch.int32, torch.int64)


def pack(numbers: Tensor, num_bits: int) -> Tensor:
    """Several small numbers in each byte, the first in the lowest bits.

    Args:
        numbers: whole, at least 0 and below ``2 ** num_bits``, shape ``(n,)``.
        num_bits: 1, 2 or 4.

    Returns:
        Uint8; the last byte is filled up with zeros.

    Example:
        >>> pack(torch.tensor([1, 2, 0, 3, 1]), 2).tolist()
        [201, 1]
    """
    per_byte = 8 // num_bits
    filled = torch.zeros(-(-len(numbers) // per_byte) * per_byte, dtype=torch.uint8)
    filled[: len(numbers)] = numbers.to(torch.uint8)
    shifts = torch.arange(0, 8, num_bits, dtype=torch.uint8)
    packed: Tensor = (filled.view(-1, per_byte) << shifts).sum(1, dtype=torch.uint8)
    return packed


def unpack(packed: Tensor, num_bits: int, num_numbers: int) -> Tensor:
    """The numbers of :func:`pack`.

    Args:
        packed: uint8, shape ``(num_bytes,)``; may come from anybody.
        num_bits: 1, 2 or 4.
        num_numbers: how many there are.

    Returns:
        Uint8, shape ``(num_numbers,)``.

    Raises:
        PayloadError: there are more or fewer bytes, or the last one is not filled up with zeros.

    Example:
        >>> unpack(torch.tensor([201, 1], dtype=torch.uint8), 2, 5).tolist()
        [1, 2, 0, 3, 1]
    """
    per_byte = 8 // num_bits
    if tuple(packed.shape) != (-(-num_numbers // per_byte),):
        raise broken(f"{packed.numel()} bytes do not hold {num_numbers} numbers of {num_bits} bits")
    shifts = torch.arange(0, 8, num_bits, dtype=torch.uint8)
    numbers: Tensor = ((packed.view(-1, 1) >> shifts) & (2**num_bits - 1)).view(-1)
    if bool(numbers[num_numbers:].any()):
        raise broken("its last byte is not filled up with zeros")
    return numbers[:num_numbers]


def pack_places(places: Tensor, num_entries: int) -> dict[str, Tensor]:
    """Which entries of a tensor are meant, as their places or as one bit per entry, whichever is shorter.

    Args:
        places: ascending, below ``num_entries``, shape ``(k,)``.
        num_entries: of the tensor.

    Returns:
        ``places`` of the smallest type that holds them, or ``mask``.

    Example:
        >>> pack_places(torch.tensor([2, 900]), 1000)["places"].dtype
        torch.int16
        >>> pack_places(torch.arange(500), 1000)["mask"].shape
        torch.Size([125])
    """
    dtype = next(kind for kind in _PLACES if num_entries - 1 <= torch.iinfo(kind).max)
    if len(places) * dtype.itemsize <= -(-num_entries // 8):
        return {"places": places.to(dtype)}
    mask = torch.zeros(num_entries, dtype=torch.uint8)
    mask[places] = 1
    return {"mask": pack(mask, 1)}


def unpack_places(parts: Mapping[str, Tensor], num_entries: int) -> Tensor:
    """The places of :func:`pack_places`.

    Args:
        parts: ``places`` or ``mask``; may come from anybody.
        num_entries: of the tensor.

    Returns:
        Int64, ascending, shape ``(k,)``.

    Raises:
        PayloadError: they are no places in such a tensor.
    """
    if "mask" in parts:
        if "places" in parts:
            raise broken("it has both places and a mask")
        mask = part(parts, "mask", [torch.uint8])
        return unpack(mask, 1, num_entries).nonzero().view(-1)
    places = part(parts, "places", _PLACES).long()
    if len(places) and (int(places[0]) < 0 or int(places[-1]) >= num_entries or bool((places.diff() <= 0).any())):
        raise broken(f"its places do not ascend from 0 to {num_entries - 1}")
    return places
