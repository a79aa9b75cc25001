"""Feature extractors that nobody trains: drawn from a seed, equal at every client that knows it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.core.errors import ModelError
from fedfuse.core.registry import register_recipe
from fedfuse.core.seeding import Rng

KINDS = ("pixels", "relu", "fourier", "patches")


class RandomFeatures(nn.Module):
    """A fixed random map of inputs to feature vectors.

    ``pixels`` only flattens. ``relu``: max(0, w x + b). ``fourier``: cos(w x + b), whose inner products approximate a
    Gaussian kernel (Rahimi and Recht, NeurIPS 2007). ``patches``: random filters without a mean over all patches of an
    image, rectified, and averaged over a grid of cells.

    Args:
        kind: one of the above.
        input_shape: shape of one input.
        num_features: how many; ``pixels`` has as many as the input has numbers, and ``patches`` rounds down to whole
            filters.
        seed: decides every weight.
        bandwidth: scale of the frequencies of ``fourier``; inputs are divided by the root of their size first.
        patch_size: side of a patch, odd.
        grid_size: cells along each side.

    Raises:
        ModelError: the kind does not exist, or patches are asked of what is no image.
    """

    def __init__(
        self,
        kind: str,
        *,
        input_shape: tuple[int, ...],
        num_features: int,
        seed: int,
        bandwidth: float = 1.0,
        patch_size: int = 5,
        grid_size: int = 4,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ModelError(f'there are no features "{kind}"', fix=f"use one of {', '.join(KINDS)}")
        if kind == "patches" and len(input_shape) != 3:
            raise ModelError(
                f"patches are cut from images, not from inputs of shape {input_shape}", fix="use relu or fourier"
            )
        self.kind, self.input_shape, self.num_features, self.seed = kind, tuple(input_shape), num_features, seed
        self.bandwidth, self.patch_size, self.grid_size = bandwidth, patch_size, grid_size
        size = math.prod(input_shape)
        self.width = size if kind == "pixels" else num_features
        self.weight: Tensor
        self.bias: Tensor
        draw = Rng(seed).torch("random features")
        # Buffers, and so part of an artifact: it must not depend on how a later torch draws.
        if kind == "patches":
            self.cells = (min(grid_size, input_shape[1]), min(grid_size, input_shape[2]))
            num_filters = max(1, num_features // math.prod(self.cells))
            self.width = num_filters * math.prod(self.cells)
            filters = torch.randn(num_filters, input_shape[0], patch_size, patch_size, generator=draw)
            if patch_size > 1:
                filters -= filters.mean((2, 3), keepdim=True)
            self.register_buffer("weight", filters / filters.flatten(1).norm(dim=1)[:, None, None, None])
        elif kind != "pixels":
            scale = (bandwidth if kind == "fourier" else 1.0) / size**0.5
            self.register_buffer("weight", torch.randn(num_features, size, generator=draw) * scale)
            shift = torch.randn(num_features, generator=draw) * 0.5
            if kind == "fourier":
                shift = torch.rand(num_features, generator=draw) * 2 * math.pi
            self.register_buffer("bias", shift)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs to features.

        Args:
            x: shape ``(n, *input_shape)``.

        Returns:
            Shape ``(n, width)``.
        """
        if self.kind == "patches":
            maps = F.conv2d(x, self.weight, padding=self.patch_size // 2).relu()
            return F.adaptive_avg_pool2d(maps, self.cells).flatten(1)
        flat = x.flatten(1)
        if self.kind == "pixels":
            return flat
        mapped = F.linear(flat, self.weight, self.bias)
        return mapped.relu() if self.kind == "relu" else mapped.cos()

    @property
    def recipe(self) -> dict[str, Any]:
        """What rebuilds it."""
        return {
            "kind": "random_features",
            "features": self.kind,
            "input_shape": list(self.input_shape),
            "num_features": self.num_features,
            "seed": self.seed,
            "bandwidth": self.bandwidth,
            "patch_size": self.patch_size,
            "grid_size": self.grid_size,
        }


@register_recipe("random_features")
def build_random_features(recipe: Mapping[str, Any]) -> RandomFeatures:
    """Build a random map.

    Args:
        recipe: what :attr:`RandomFeatures.recipe` gave.

    Returns:
        The same map, drawn anew from its seed.
    """
    return RandomFeatures(
        recipe["features"],
        input_shape=tuple(recipe["input_shape"]),
        num_features=int(recipe["num_features"]),
        seed=int(recipe["seed"]),
        bandwidth=float(recipe["bandwidth"]),
        patch_size=int(recipe["patch_size"]),
        grid_size=int(recipe["grid_size"]),
    )
