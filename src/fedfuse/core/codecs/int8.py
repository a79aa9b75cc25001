"""Numbers in eight bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedfuse.core.codecs.codec import Codec, check_parts, part
from fedfuse.core.registry import register_codec

_LARGEST = 127


@register_codec("int8", reference="linear quantisation, symmetric")
@dataclass(frozen=True, kw_only=True)
class Int8(Codec):
    """Every number as one of 255 steps of a scale: a quarter of the bytes of float32.

    Args:
        keys: patterns of the tensors that are coded; empty is all weights, see :class:`Codec`.
        min_entries: smaller tensors travel as they are.
        scale_per: one scale for each ``row`` (output channel) of a matrix or kernel, or for a whole ``tensor``.
        rounding: to the ``nearest`` step, or to one of its two neighbours by chance (``stochastic``), so that the mean
            over many clients is that of the numbers themselves.
    """

    scale_per: Literal["row", "tensor"] = "row"
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def encode(self, values: Tensor, dtype: torch.dtype, draw: torch.Generator) -> dict[str, Tensor]:
        """Round; the error is at most half a step, or one step where it is left to chance.

        Args:
            values: float64, finite.
            dtype: of the tensor.
            draw: decides between two steps.

        Returns:
            ``steps``, int8 of the same shape, and ``scales``, float32, one per row.
        """
        rows = values.reshape(self._num_rows(values.shape), -1)
        scales = (rows.abs().amax(1) / _LARGEST).float()
        steps = rows / torch.where(scales > 0, scales.double(), 1.0)[:, None]
        if self.rounding == "nearest":
            steps = steps.round()
        else:
            steps = (steps + torch.rand(steps.shape, generator=draw, dtype=torch.float64)).floor()
        return {"steps": steps.clamp(-_LARGEST, _LARGEST).to(torch.int8).view(values.shape), "scales": scales}

    def decode(self, parts: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        """Steps times scales.

        Args:
            parts: as :meth:`encode` makes them.
            shape: of the tensor.

        Raises:
            PayloadError: they are something else.
        """
        check_parts(parts, "steps", "scales")
        num_rows = self._num_rows(shape)
        steps = part(parts, "steps", [torch.int8], tuple(shape))
        scales = part(parts, "scales", [torch.float32], (num_rows,))
        return (steps.double().reshape(num_rows, -1) * scales.double()[:, None]).view(tuple(shape))

    def _num_rows(self, shape: Sequence[int]) -> int:
        return shape[0] if self.scale_per == "row" and len(shape) > 1 else 1
