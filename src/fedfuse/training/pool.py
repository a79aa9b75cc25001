"""Inputs that were made, kept for a student to learn from."""

from __future__ import annotations

import torch
from torch import Tensor


class Pool:
    """All inputs made so far, raw; pixels are kept in 8 bits, as image files would.

    Args:
        is_pixels: whether values are in [0, 1].
    """

    def __init__(self, *, is_pixels: bool) -> None:
        self.is_pixels = is_pixels
        self.stored = torch.empty(0)
        self.labels = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            images: raw, shape ``(n, *input_shape)``; 8-bit ones are taken as they are.
            labels: shape ``(n,)``.
        """
        images = images.detach().cpu()
        if self.is_pixels and images.dtype != torch.uint8:
            images = (images.clamp(0, 1) * 255).round().to(torch.uint8)
        images = images.contiguous()
        self.stored = torch.cat([self.stored, images]) if len(self) else images
        self.labels = torch.cat([self.labels, labels.cpu()])

    def images(self, index: Tensor) -> Tensor:
        """Inputs at these positions.

        Args:
            index: positions, shape ``(n,)``.

        Returns:
            Raw, float32, shape ``(n, *input_shape)``.
        """
        chosen = self.stored[index]
        return chosen.float() / 255 if self.is_pixels else chosen
