"""Blocks side by side give the numbers of the loop, or say that they cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedfuse.models import spec
from fedfuse.models.blocks import cut, cut_spec
from fedfuse.models.parallel import parallel

FAMILIES: list[tuple[str, dict[str, Any], int]] = [
    ("mlp", {"width": 16, "depth": 3, "dropout": 0.2}, 3),
    ("cnn", {"width": 4}, 4),
    ("cnn", {"width": 4, "norm": "group"}, 4),
    ("cnn", {"width": 4, "norm": "none"}, 3),
    ("resnet", {"width": 4}, 4),
    ("resnet", {"width": 4, "norm": "group"}, 4),
    ("resnet", {"width": 4, "depth": 50, "norm": "none"}, 4),
]


def _trained(module: nn.Module, seed: int) -> nn.Module:
    """Statistics and affine weights that are not those of the first moment."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + (0.5 if "var" in name else -0.5))
    return module.eval()


def _loop(blocks: list[nn.Module], x: Tensor, shared: bool) -> Tensor:
    parts = [x] * len(blocks) if shared else list(x.chunk(len(blocks), 1))
    return torch.cat([block(part) for block, part in zip(blocks, parts, strict=True)], 1)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("family", "values", "num_blocks"), FAMILIES)
def test_every_block_of_every_family_is_the_loop(
    family: str, values: dict[str, Any], num_blocks: int, count: int
) -> None:
    specs = [spec(family, values, input_shape=(3, 16, 16), num_classes=5, seed=s) for s in range(count)]
    pieces = [cut_spec(one, num_blocks).copy() for one in specs]
    x = specs[0].example_input(4)
    with torch.inference_mode():
        for k in range(num_blocks):
            blocks = [_trained(piece.blocks[k], seed) for seed, piece in enumerate(pieces)]
            expected = _loop(blocks, x, shared=k == 0)
            together = parallel(blocks, ndim=x.ndim, shared=k == 0)
            assert together is not None
            before = x.clone()
            torch.testing.assert_close(together(x), expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(x, before)
            x = expected


def test_two_linear_layers_by_hand() -> None:
    blocks = []
    for weight in (2.0, 3.0):
        module = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
        for parameter in module.parameters():
            parameter.data.fill_(weight)
        blocks.append(cut(module, 1, torch.zeros(2, 1)).blocks[0].eval())
    x = torch.tensor([[1.0], [-4.0]])
    together = parallel(blocks, ndim=2, shared=True)
    assert together is not None
    # 2 * 1 + 2 and 3 * 1 + 3; 2 * -4 + 2 and 3 * -4 + 3 are below zero.
    assert torch.equal(together(x), torch.tensor([[4.0, 6.0], [0.0, 0.0]]))


@settings(max_examples=25)
@given(st.integers(1, 4), st.lists(st.sampled_from(["conv", "strided", "depthwise", "norm", "group", "relu", "pool"]),
                                   min_size=1, max_size=6), st.booleans(), st.integers(0, 9))  # fmt: skip
def test_random_networks_are_the_loop(count: int, kinds: list[str], shared: bool, seed: int) -> None:
    make = {
        "conv": lambda: nn.Conv2d(4, 4, 3, padding=1, bias=False),
        "strided": lambda: nn.Conv2d(4, 4, 3, stride=2, padding=1),
        "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2),
        "norm": lambda: nn.BatchNorm2d(4),
        "group": lambda: nn.GroupNorm(2, 4),
        "relu": lambda: nn.ReLU(),
        "pool": lambda: nn.AvgPool2d(3, 1, 1),
    }
    x = torch.randn(3, 4 if shared else 4 * count, 8, 8, generator=torch.Generator().manual_seed(seed))
    blocks = []
    for column in range(count):
        # The first layer joins a shared input.
        body = [nn.Conv2d(4, 4, 1), *(make[kind]() for kind in kinds)]
        whole = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        blocks.append(_trained(cut(whole, 1, torch.zeros(2, 4, 8, 8)).blocks[0], seed + column))
    together = parallel(blocks, ndim=4, shared=shared)
    assert together is not None
    with torch.inference_mode():
        torch.testing.assert_close(together(x), _loop(blocks, x, shared), rtol=1e-4, atol=1e-5)


def test_what_has_no_joined_form_gives_none() -> None:
    x = torch.zeros(2, 3)
    narrow = cut(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), 1, x).blocks[0].eval()
    wide = cut(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), 1, x).blocks[0].eval()
    other = cut(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), 1, x).blocks[0].eval()
    softmax = cut(nn.Sequential(nn.Linear(3, 4), nn.Softmax(1), nn.Linear(4, 2)), 1, x).blocks[0].eval()
    assert parallel([narrow, narrow], ndim=2, shared=True) is not None
    for blocks in ([narrow, wide], [narrow, other], [softmax, softmax], [nn.Identity(), nn.Identity()]):
        assert parallel(blocks, ndim=2, shared=True) is None
