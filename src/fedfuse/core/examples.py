"""What a client owns: labelled examples in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedfuse.core.errors import DataError


@dataclass(frozen=True)
class Examples:
    """Labelled examples as two tensors.

    Args:
        x: inputs, shape ``(num_examples, *input_shape)``.
        y: labels, shape ``(num_examples,)``, int64.

    Raises:
        DataError: the two do not have the same length.
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise DataError(f"{len(self.x)} inputs came with {len(self.y)} labels", fix="give one label per input")

    def __len__(self) -> int:
        return len(self.y)

    def subset(self, indices: Sequence[int] | np.ndarray | Tensor) -> Examples:
        """The examples at these positions, copied.

        Args:
            indices: positions, shape ``(n,)``.
        """
        index = torch.as_tensor(indices, dtype=torch.int64)
        return Examples(self.x[index], self.y[index])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over shapes, dtypes and contents, 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for tensor in (self.x, self.y):
            digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True)
class ClientData:
    """The data of one client; it never leaves the client's side.

    Args:
        train: what local training sees.
        validation: split off the client's training data; for early stopping and choices, never for the report's
            accuracy. May be empty.
        num_classes: number of classes of the whole task, not only of those that this client holds.
        augment: name of the augmentation applied to training batches (see ``fedfuse.data.augment``).
    """

    train: Examples
    validation: Examples
    num_classes: int
    augment: str = "none"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the data and of how it is used; the same data gives the same answer to the same question."""
        parts = [self.train.fingerprint, self.validation.fingerprint, str(self.num_classes), self.augment]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class InputSpace:
    """What inputs look like, for those who must make some without having seen any.

    Args:
        mean: what was subtracted from each channel or feature of the raw inputs; empty means nothing was.
        std: what they were then divided by.
        is_pixels: whether raw inputs are images with values in [0, 1].
        augment: name of the augmentation that clients train with.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    is_pixels: bool = False
    augment: str = "none"

    def normalize(self, raw: Tensor) -> Tensor:
        """Raw inputs as models see them.

        Args:
            raw: shape ``(n, channels, ...)``.

        Returns:
            The same shape; gradients pass.
        """
        mean, std = self._constants(raw)
        return raw if mean is None or std is None else (raw - mean) / std

    def restore(self, x: Tensor) -> Tensor:
        """What models see as raw inputs again.

        Args:
            x: shape ``(n, channels, ...)``.

        Returns:
            The same shape; pixels stay in [0, 1].
        """
        mean, std = self._constants(x)
        raw = x if mean is None or std is None else x * std + mean
        return raw.clamp(0, 1) if self.is_pixels else raw

    def _constants(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if not self.mean:
            return None, None
        shape = (1, -1, *[1] * (x.dim() - 2))
        return x.new_tensor(self.mean).view(shape), x.new_tensor(self.std).view(shape)
