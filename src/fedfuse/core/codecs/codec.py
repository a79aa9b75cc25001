"""The contract of a codec: how the numbers of one tensor are said in fewer bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError, PayloadError


@dataclass(frozen=True, kw_only=True)
class Codec:
    """Base of all codecs. A subclass is a frozen dataclass of settings, registered by name.

    Args:
        keys: patterns of the tensors that are coded; empty is all whose start both sides know, which are weights. What
            is named but has no known start is coded itself instead of its change. Only floating-point tensors are
            coded, and neither learning curves nor running statistics.
        min_entries: smaller tensors travel as they are, at least 1.
    """

    keys: tuple[str, ...] = ()
    min_entries: int = 64

    def __post_init__(self) -> None:
        if self.min_entries < 1:
            raise ConfigError(f"min_entries is {self.min_entries}", where="upload.min_entries", fix="give at least 1")

    @property
    def keeps_unsent(self) -> bool:
        """Whether the client keeps what a code left out, and adds it to what it sends under the same key next time."""
        return False

    def encode(self, values: Tensor, dtype: torch.dtype, draw: torch.Generator) -> dict[str, Tensor]:
        """Say a tensor in fewer bytes.

        Args:
            values: float64, on the CPU, finite, of any shape, with at least one entry.
            dtype: of the tensor whose values these are.
            draw: for what is left to chance; drawn from by the client alone.

        Returns:
            Name of a part to tensor.
        """
        raise NotImplementedError

    def decode(self, parts: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        """What a code says; the parts may come from anybody.

        Args:
            parts: name to tensor.
            shape: of the tensor.

        Returns:
            Float64 of that shape.

        Raises:
            PayloadError: it says nothing of a tensor of that shape.
        """
        raise NotImplementedError


def part(
    parts: Mapping[str, Tensor], name: str, dtypes: Sequence[torch.dtype], shape: tuple[int, ...] | None = None
) -> Tensor:
    """One part of a code that came from somebody.

    Args:
        parts: name to tensor.
        name: of the part.
        dtypes: that it may have.
        shape: that it must have; ``None`` is any vector.

    Raises:
        PayloadError: it is not there or is something else.
    """
    found = parts.get(name)
    if found is None:
        raise broken(f"it has no {name}")
    if found.dtype not in dtypes:
        raise broken(f"the dtype of its {name} is {found.dtype}")
    if found.ndim != 1 if shape is None else tuple(found.shape) != shape:
        raise broken(f"the shape of its {name} is {tuple(found.shape)}")
    return found


def check_parts(parts: Mapping[str, Tensor], *names: str) -> None:
    """Refuse parts that no such code has.

    Args:
        parts: name to tensor.
        names: of all parts that there may be.

    Raises:
        PayloadError: there are others.
    """
    for name in sorted(set(parts) - set(names)):
        raise broken(f"it has a part {name!r:.40}")


def broken(reason: str) -> PayloadError:
    """The error of a code that says nothing.

    Args:
        reason: why.
    """
    return PayloadError(f"its code is broken: {reason}", fix="send what the codec makes")
