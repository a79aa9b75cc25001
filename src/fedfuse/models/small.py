"""A very small classifier of images, vectors or texts, the same for clients whose own models differ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from fedfuse.core.registry import register_recipe

InputKind = Literal["image", "vector", "tokens"]

_GRID = 4


class TokenMean(nn.Module):
    """The mean of the tokens' embeddings, with far fewer embeddings than there are tokens.

    Args:
        num_buckets: embeddings; a token takes the one of its number modulo this.
        width: of an embedding.
    """

    def __init__(self, num_buckets: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_buckets, width)

    def forward(self, x: Tensor) -> Tensor:
        """Look up and average.

        Args:
            x: tokens as floats, shape ``(n, length)``; below 0 is padding.

        Returns:
            Shape ``(n, width)``; 0 for a text without tokens.
        """
        ids = x.round().long()
        is_there = (ids >= 0).to(self.embedding.weight.dtype)[..., None]
        found = self.embedding(ids.clamp(min=0) % self.embedding.num_embeddings) * is_there
        mean: Tensor = found.sum(1) / is_there.sum(1).clamp(min=1)
        return mean


def small_recipe(
    kind: InputKind, input_shape: tuple[int, ...], num_classes: int, *, width: int, rank: int, num_buckets: int
) -> dict[str, Any]:
    """The recipe of a small classifier.

    Args:
        kind: of the inputs.
        input_shape: of one input.
        num_classes: number of outputs.
        width: channels of the convolution, units of the layer, or size of an embedding.
        rank: width of the last but one layer.
        num_buckets: embeddings, for tokens.
    """
    return {
        "kind": "small",
        "inputs": kind,
        "input_shape": list(input_shape),
        "num_classes": num_classes,
        "width": width,
        "rank": rank,
        "num_buckets": num_buckets,
    }


@register_recipe("small")
def build_small(recipe: Mapping[str, Any]) -> nn.Module:
    """Build a small classifier: one layer on the inputs, and a linear head of low rank.

    Args:
        recipe: what :func:`small_recipe` gave.

    Returns:
        The module with fresh weights.
    """
    width, shape = int(recipe["width"]), [int(size) for size in recipe["input_shape"]]
    if recipe["inputs"] == "tokens":
        layers: list[nn.Module] = [TokenMean(int(recipe["num_buckets"]), width)]
        size = width
    elif recipe["inputs"] == "image":
        layers = [nn.Conv2d(shape[0], width, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(_GRID)]
        layers.append(nn.Flatten())
        size = width * _GRID**2
    else:
        layers = [nn.Flatten(), nn.Linear(math.prod(shape), width), nn.ReLU()]
        size = width
    rank = int(recipe["rank"])
    return nn.Sequential(*layers, nn.Linear(size, rank, bias=False), nn.Linear(rank, int(recipe["num_classes"])))
