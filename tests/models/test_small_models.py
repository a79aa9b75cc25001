"""Very small classifiers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedfuse.core.artifact import build
from fedfuse.models.small import TokenMean, small_recipe

SIZES = {"width": 6, "rank": 2, "num_buckets": 5}


@pytest.mark.parametrize(
    ("kind", "shape", "num_values"),
    [
        # Convolution 1 x 6 x 9 + 6, then 96 x 2, then 2 x 3 + 3.
        ("image", (1, 8, 8), 60 + 192 + 9),
        ("vector", (7,), 48 + 12 + 9),
        ("tokens", (10,), 30 + 12 + 9),
    ],
)
def test_sizes_by_hand(kind: Any, shape: tuple[int, ...], num_values: int) -> None:
    module = build(small_recipe(kind, shape, 3, **SIZES))
    assert sum(p.numel() for p in module.parameters()) == num_values
    assert module(torch.rand(4, *shape)).shape == (4, 3)


def test_tokens_are_averaged_without_padding_and_share_embeddings() -> None:
    mean = TokenMean(3, 2)
    with torch.no_grad():
        mean.embedding.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [4.0, 4.0]]))
    # 4 is 1 modulo 3.
    x = torch.tensor([[0.0, 4.0, -1.0, -1.0], [2.0, 2.0, 5.0, -1.0], [-1.0, -1.0, -1.0, -1.0]])
    assert mean(x).tolist() == [[0.5, 1.0], [4.0, 4.0], [0.0, 0.0]]
