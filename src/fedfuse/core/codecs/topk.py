"""The few largest changes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedfuse.core.codecs.codec import Codec, broken, check_parts, part
from fedfuse.core.codecs.packing import pack_places, unpack_places
from fedfuse.core.errors import ConfigError
from fedfuse.core.registry import register_codec


@register_codec("topk", paper="https://arxiv.org/abs/1809.07599", reference="Stich et al., NeurIPS 2018")
@dataclass(frozen=True, kw_only=True)
class TopK(Codec):
    """The largest changes of every tensor; what was left out is added to the next change of the same tensor.

    Stich et al., NeurIPS 2018, algorithm 1, with the change of a whole exchange in place of one gradient. Places are
    sent as numbers or as one bit per entry, whichever is shorter.

    Args:
        keys: patterns of the tensors that are coded; empty is all weights, see :class:`Codec`.
        min_entries: smaller tensors travel as they are.
        fraction: of the entries that is sent, in (0, 1].
        error_feedback: whether a client that is asked again adds what it left out.
    """

    fraction: float = 0.1
    error_feedback: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fraction <= 1:
            raise ConfigError(
                f"fraction is {self.fraction:g}", where="upload.fraction", fix="give a number above 0, at most 1"
            )

    @property
    def keeps_unsent(self) -> bool:
        """Whether there is error feedback."""
        return self.error_feedback

    def encode(self, values: Tensor, dtype: torch.dtype, draw: torch.Generator) -> dict[str, Tensor]:
        """Keep the largest; of equal ones the first.

        Args:
            values: float64, finite.
            dtype: of the tensor; its precision is kept.
            draw: not used.

        Returns:
            ``values`` and their ``places`` or ``mask``.
        """
        flat = values.reshape(-1)
        places = largest(flat, self.fraction)
        return {"values": flat[places].to(dtype), **pack_places(places, len(flat))}

    def decode(self, parts: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        """Values at their places, and zeros.

        Args:
            parts: as :meth:`encode` makes them.
            shape: of the tensor.

        Raises:
            PayloadError: they are something else.
        """
        check_parts(parts, "values", "places", "mask")
        values = part(parts, "values", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
        places = unpack_places({name: tensor for name, tensor in parts.items() if name != "values"}, math.prod(shape))
        if len(places) != len(values):
            raise broken(f"{len(values)} values have {len(places)} places")
        flat = torch.zeros(math.prod(shape), dtype=torch.float64)
        flat[places] = values.double()
        return flat.view(tuple(shape))


def largest(flat: Tensor, fraction: float) -> Tensor:
    """Where the largest entries are.

    Args:
        flat: shape ``(n,)``.
        fraction: of them, in (0, 1]; at least one is found.

    Returns:
        Their places, ascending; of equally large ones the first.

    Example:
        >>> largest(torch.tensor([1.0, -3.0, 2.0, 3.0]), 0.5).tolist()
        [1, 3]
    """
    count = max(1, math.ceil(fraction * len(flat) - 1e-9))
    order = flat.abs().sort(descending=True, stable=True).indices
    return order[:count].sort().values
