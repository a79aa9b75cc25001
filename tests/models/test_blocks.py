"""Any model in blocks: the same numbers, the same names, balanced, and rebuilt from recipes."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedfuse.core.artifact import ModelSpec, build, load_state
from fedfuse.core.errors import ModelError
from fedfuse.core.seeding import Rng
from fedfuse.models import spec
from fedfuse.models.blocks import Pieces, cut, cut_spec

FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, ...], int]] = {
    "mlp": ("mlp", {"width": 16, "depth": 4, "dropout": 0.2}, (1, 8, 8), 4),
    "cnn": ("cnn", {"width": 8}, (1, 16, 16), 4),
    "cnn_wide": ("cnn", {"width": 32, "depth": 6}, (3, 8, 8), 6),
    "cnn_group": ("cnn", {"width": 8, "norm": "group"}, (3, 8, 8), 4),
    "cnn_none": ("cnn", {"width": 8, "norm": "none"}, (3, 8, 8), 3),
    "resnet": ("resnet", {"width": 4}, (3, 16, 16), 4),
    "resnet50_group": ("resnet", {"width": 4, "depth": 50, "norm": "group"}, (3, 16, 16), 8),
    "vit": ("vit", {"width": 16, "depth": 4}, (3, 8, 8), 4),
    "vit_token": ("vit", {"width": 16, "depth": 4, "pool": "token", "dropout": 0.1}, (1, 8, 8), 4),
}


def _spec(key: str) -> tuple[ModelSpec, int]:
    name, values, shape, num_blocks = FAMILIES[key]
    return spec(name, values, input_shape=shape, num_classes=5, seed=1), num_blocks


def _run(pieces: Pieces, x: Tensor) -> Tensor:
    for block in pieces.blocks:
        x = block(x)
    return pieces.head(x)


def _state(pieces: Pieces) -> dict[str, Tensor]:
    state = {name: tensor for block in pieces.blocks for name, tensor in block.state_dict().items()}
    return state | {f"{pieces.head_name}.{name}": tensor for name, tensor in pieces.head.state_dict().items()}


@pytest.mark.parametrize("key", FAMILIES)
def test_blocks_and_head_are_the_model_bit_for_bit_in_both_modes(key: str) -> None:
    one, num_blocks = _spec(key)
    whole, pieces = one.build(), cut_spec(one, num_blocks).copy()
    x = one.example_input(4)
    for training in (False, True, False):
        whole.train(training)
        for piece in (*pieces.blocks, pieces.head):
            piece.train(training)
        with torch.no_grad():
            with Rng(0).ambient("run"):
                expected = whole(x)
            with Rng(0).ambient("run"):
                assert torch.equal(_run(pieces, x), expected)
    # The step in training mode moved the running statistics of both alike, and names are the model's own.
    state, own = _state(pieces), whole.state_dict()
    assert set(state) == set(own)
    assert all(torch.equal(state[name], own[name]) for name in own)
    assert all(sum(p.numel() for p in block.parameters()) > 0 for block in pieces.blocks)


@pytest.mark.parametrize("key", FAMILIES)
def test_recipes_rebuild_the_blocks(key: str) -> None:
    one, num_blocks = _spec(key)
    pieces = cut_spec(one, num_blocks)
    x = one.example_input(2)
    for block, recipe, (channels, ndim) in zip(pieces.blocks, pieces.recipes, pieces.interfaces, strict=True):
        rebuilt = build(json.loads(json.dumps(recipe)))
        load_state(rebuilt, block.state_dict())
        with torch.no_grad():
            expected = block.eval()(x)
            assert torch.equal(rebuilt.eval()(x), expected)
        x = expected
        assert (x.shape[2 if ndim == 3 else 1], x.ndim) == (channels, ndim)
    assert x.shape == (2, pieces.head.in_features)


def test_transformers_are_cut_between_tokens() -> None:
    assert cut_spec(_spec("vit")[0], 4).interfaces == [(16, 3), (16, 3), (16, 3), (16, 2)]


def test_a_cut_does_not_part_a_layer_from_its_norm_and_activation() -> None:
    pieces = cut_spec(_spec("cnn")[0], 4)
    for block in pieces.blocks:
        layers = [m for m in block.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.ReLU))]
        assert [type(m) for m in layers] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]


@settings(max_examples=30)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=6), st.data())
def test_no_other_cut_has_a_smaller_largest_block(widths: list[int], data: st.DataObject) -> None:
    num_blocks = data.draw(st.integers(1, len(widths)))
    sizes = [3, *widths]
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(sizes)]
    pieces = cut(nn.Sequential(*layers, nn.Linear(sizes[-1], 2)), num_blocks, torch.zeros(2, 3))
    costs = [a * b + b for a, b in pairwise(sizes)]

    def best(rest: list[int], number: int) -> int:
        if number == 1:
            return sum(rest)
        return min(max(sum(rest[:i]), best(rest[i:], number - 1)) for i in range(1, len(rest) - number + 2))

    largest = max(sum(p.numel() for p in block.parameters()) for block in pieces.blocks)
    assert len(pieces.blocks) == num_blocks
    assert largest == best(costs, num_blocks)


def test_balance_by_compute_counts_positions() -> None:
    # Parameters 72, 576, 4608; positions 256, 16, 16: multiplications 18432, 9216, 73728.
    module = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(4)),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    x = torch.zeros(2, 1, 16, 16)
    by_compute = cut(module, 2, x, balance="compute")
    by_parameters = cut(module, 2, x, balance="parameters")
    # 18432 against 9216 + 9216, and 72 + 576 against 576.
    assert [len(list(b.parameters())) for b in by_compute.blocks] == [1, 2]
    assert [len(list(b.parameters())) for b in by_parameters.blocks] == [2, 1]


class Reusing(nn.Module):
    """Uses one ReLU everywhere, and a function whose node has the same name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.relu, self.head = nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        x = self.relu(self.second(x))
        return self.head(self.relu(self.third(x)))


def test_a_layer_used_many_times_is_cut_at_the_same_use_again() -> None:
    module, x = Reusing(), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    pieces = cut(module, 3, x)
    assert pieces.points == ("relu", "relu_1")
    again = cut(module, 3, x, points=pieces.points)
    assert [list(b.state_dict()) for b in again.blocks] == [
        [f"{n}.weight", f"{n}.bias"] for n in ("first", "second", "third")
    ]
    assert torch.equal(_run(again, x), module(x))


def test_pieces_share_nothing_with_the_model() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    pieces = cut(module, 1, torch.zeros(2, 3))
    with torch.no_grad():
        for parameter in (*pieces.blocks[0].parameters(), *pieces.head.parameters()):
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_whole_weights_go_into_pieces() -> None:
    one, num_blocks = _spec("cnn")
    state = {name: torch.full_like(tensor, 2) for name, tensor in one.build().state_dict().items()}
    pieces = cut_spec(one, num_blocks).copy()
    pieces.load_whole(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in _state(pieces).items())
    del state["0.weight"]
    with pytest.raises(ModelError) as caught:
        pieces.load_whole(state)
    assert caught.value.what == "the weights lack '0.weight'"


def test_named_points() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    pieces = cut(module, 2, torch.zeros(2, 3), points=["1"])
    assert [list(b.state_dict()) for b in pieces.blocks] == [["0.weight", "0.bias"], ["2.weight", "2.bias"]]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(x + self.b(x))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def _shared() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("module", "num_blocks", "points", "what"),
    [
        (Residual(), 3, None, "the model cannot be cut into 3 blocks, at most into 2"),
        (Residual(), 0, None, "0 blocks"),
        (Residual(), 2, ["b"], 'the model cannot be cut after "b": more than one tensor crosses there'),
        (Residual(), 2, ["c"], 'there is no layer "c"'),
        (Residual(), 3, ["a"], "1 points make 2 blocks, not 3"),
        (nn.Sequential(nn.Linear(3, 2), nn.ReLU()), 1, None, "the model ends in ReLU, not in a linear layer"),
        (nn.Sequential(nn.Linear(3, 2)), 1, None, "the model is a single linear layer and has no block"),
        (_shared(), 2, None, 'the weight "0.weight" is used in two blocks'),
        (
            nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)), nn.Linear(3, 2)),
            3,
            ["2", "1"],
            "the points are not in the order of the model",
        ),
    ],
)
def test_what_cannot_be_cut_is_said(module: nn.Module, num_blocks: int, points: list[str] | None, what: str) -> None:
    with pytest.raises(ModelError) as caught:
        cut(module, num_blocks, torch.zeros(2, 3), points=points)
    assert caught.value.what == what
    assert caught.value.fix


def test_a_part_that_cannot_be_traced_stays_whole_in_one_block() -> None:
    module = nn.Sequential(nn.Linear(3, 3), Branching(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(_run(cut(module, 2, x), x), module(x))
    with pytest.raises(ModelError, match="the model cannot be traced"):
        cut(Branching(), 1, x)


def test_a_model_without_recipe_has_opaque_blocks() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    one = ModelSpec(recipe={"kind": "opaque"}, seed=0, input_shape=(3,), num_classes=2, template=module)
    assert cut_spec(one, 1).recipes == [{"kind": "opaque"}]
