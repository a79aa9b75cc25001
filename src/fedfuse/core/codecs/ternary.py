"""Up, down or not at all: two bits per number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedfuse.core.codecs.codec import Codec, broken, check_parts, part
from fedfuse.core.codecs.packing import pack, unpack
from fedfuse.core.errors import ConfigError
from fedfuse.core.registry import register_codec

_UP, _DOWN = 1, 2


@register_codec("ternary", paper="https://arxiv.org/abs/2003.03564", reference="Xu et al., TNNLS 2020")
@dataclass(frozen=True, kw_only=True)
class Ternary(Codec):
    """Every change as -a, 0 or +a, with one a per tensor: a sixteenth of the bytes of float32.

    The uploads of T-FedAvg (Xu et al., TNNLS 2020), section III. The threshold is a multiple of the mean magnitude,
    and a is the mean magnitude of the entries above it, the best a for these entries in the squared sense.

    Departures: changes are coded, not weights, because training here does not know that its weights will be; a
    follows from the numbers instead of being trained; the server's messages are not coded.

    Args:
        keys: patterns of the tensors that are coded; empty is all weights, see :class:`Codec`.
        min_entries: smaller tensors travel as they are.
        threshold: in mean magnitudes, 0 or more; entries up to it become 0.
        error_feedback: whether a client that is asked again adds what it left out.
    """

    threshold: float = 0.7
    error_feedback: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold < math.inf:
            raise ConfigError(f"threshold is {self.threshold:g}", where="upload.threshold", fix="give 0 or more")

    @property
    def keeps_unsent(self) -> bool:
        """Whether there is error feedback."""
        return self.error_feedback

    def encode(self, values: Tensor, dtype: torch.dtype, draw: torch.Generator) -> dict[str, Tensor]:
        """Compare with the threshold.

        Args:
            values: float64, finite.
            dtype: of the tensor.
            draw: not used.

        Returns:
            ``signs``, four to a byte, and ``size``, float32.
        """
        flat = values.reshape(-1)
        sizes = flat.abs()
        above = sizes > self.threshold * sizes.mean()
        signs = torch.where(above, torch.where(flat > 0, _UP, _DOWN), 0)
        size = sizes[above].mean() if bool(above.any()) else torch.zeros((), dtype=torch.float64)
        return {"signs": pack(signs, 2), "size": size.float().view(1)}

    def decode(self, parts: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        """Signs times size.

        Args:
            parts: as :meth:`encode` makes them.
            shape: of the tensor.

        Raises:
            PayloadError: they are something else.
        """
        check_parts(parts, "signs", "size")
        signs = unpack(part(parts, "signs", [torch.uint8]), 2, math.prod(shape))
        if bool((signs > _DOWN).any()):
            raise broken("a sign is neither up nor down")
        size = part(parts, "size", [torch.float32], (1,)).double()
        flat = (signs == _UP).double() - (signs == _DOWN).double()
        return (flat * size).view(tuple(shape))
