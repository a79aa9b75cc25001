"""Levels of columns: what adaptors and levels compute, and that inference in one pass has the numbers of the loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedfuse.core.artifact import build, detached_state, load_state
from fedfuse.core.errors import ModelError
from fedfuse.models import fused, spec
from fedfuse.models.blocks import cut_spec
from fedfuse.models.fused import ADAPTORS, Adaptor, Column, FusedBlocks, Level

FAMILIES: list[tuple[str, dict[str, Any], tuple[int, ...], int]] = [
    ("mlp", {"width": 8, "depth": 3, "dropout": 0.2}, (1, 8, 8), 3),
    ("cnn", {"width": 4}, (1, 12, 12), 4),
    ("cnn", {"width": 4, "norm": "group"}, (1, 12, 12), 4),
    ("cnn", {"width": 4, "norm": "none"}, (1, 12, 12), 3),
    ("resnet", {"width": 4}, (3, 12, 12), 4),
    ("resnet", {"width": 4, "norm": "group"}, (3, 12, 12), 4),
    ("resnet", {"width": 4, "norm": "none"}, (3, 12, 12), 2),
    ("vit", {"width": 8, "heads": 2, "depth": 2}, (1, 8, 8), 2),
]


def network(
    family: str, settings: dict[str, Any], shape: tuple[int, ...], num_blocks: int, count: int, adaptor: str
) -> FusedBlocks:
    """Columns with different weights, and statistics and biases that are not those of the first moment."""
    pieces = [
        cut_spec(spec(family, settings, input_shape=shape, num_classes=3, seed=s), num_blocks).copy()
        for s in range(count)
    ]
    torch.manual_seed(0)
    levels = []
    for k in range(num_blocks):
        columns = []
        for own in pieces:
            channels, ndim = own.interfaces[k - 1]
            columns.append(Column(Adaptor(adaptor, [channels] * count, channels, ndim) if k else None, own.blocks[k]))
        levels.append(Level(columns))
    net = FusedBlocks(levels, block_recipes=[[own.recipes[k] for own in pieces] for k in range(num_blocks)])
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.add_(torch.rand(tensor.shape) * (1 if "var" in name else 0.4))
    return net.eval()


def loop(net: FusedBlocks, x: Tensor) -> Tensor:
    """Column by column, as when gradients are wanted."""
    with torch.enable_grad():
        return net(x).detach()


@pytest.mark.parametrize("adaptor", ADAPTORS)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(("family", "settings", "shape", "num_blocks"), FAMILIES)
def test_inference_has_the_numbers_of_the_loop(
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    settings: dict[str, Any],
    shape: tuple[int, ...],
    num_blocks: int,
    count: int,
    adaptor: str,
) -> None:
    net = network(family, settings, shape, num_blocks, count, adaptor)
    x = torch.randn(3, *shape)
    expected, before = loop(net, x), x.clone()
    for way in ("joined", "alone", "plain"):
        monkeypatch.setattr(fused, "fastest_way", lambda blocks, one, way=way: way)
        with torch.inference_mode():
            once, again = net(x), net(x)
        torch.testing.assert_close(once, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(once, again)
        assert torch.equal(x, before)


def test_shapes_choose_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = fused.parallel

    def watched(blocks: list[nn.Module], *, ndim: int, shared: bool) -> Any:
        seen.append(len(blocks))
        return plain(blocks, ndim=ndim, shared=shared)

    monkeypatch.setattr(fused, "parallel", watched)
    net = network("cnn", {"width": 4}, (1, 12, 12), 2, 3, "conv1x1")
    with torch.inference_mode():
        # Weights are copied for no more than they are used: the blocks have 500 and 592.
        net(torch.zeros(1, 1, 12, 12))
        assert seen == []
        net(torch.zeros(20, 1, 12, 12))
        assert seen == [3, 3]
        seen.clear()
        # 3 columns x 4 channels x 144 positions x 2000 inputs are more than 2^21 numbers; behind the pooling
        # 3 x 8 x 36 x 2000 are fewer.
        net(torch.zeros(2000, 1, 12, 12))
    assert seen == [1, 1, 1, 3]


def _ask(net: FusedBlocks, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return net(x).clone()


def _through_data(net: FusedBlocks, other: FusedBlocks) -> None:
    for own, new in zip(net.parameters(), other.parameters(), strict=True):
        own.data.copy_(new.data)
    for buffer, value in zip(net.buffers(), other.buffers(), strict=True):
        buffer.data.copy_(value)


def _through_new_parameters(net: FusedBlocks, other: FusedBlocks) -> None:
    for own, new in zip(net.modules(), copy.deepcopy(other).modules(), strict=True):
        own._parameters, own._buffers = new._parameters, new._buffers


@pytest.mark.parametrize(
    "change", [lambda net, other: load_state(net, detached_state(other)), _through_data, _through_new_parameters]
)
def test_changed_weights_count_at_once(change: Any) -> None:
    net = network("cnn", {"width": 4}, (1, 12, 12), 3, 2, "conv1x1")
    other = copy.deepcopy(net)
    for tensor in other.state_dict().values():
        tensor.mul_(2)
    x = torch.randn(3, 1, 12, 12)
    old = _ask(net, x)
    change(net, other)
    assert torch.equal(_ask(net, x), _ask(other, x))
    assert not torch.allclose(_ask(net, x), old)


def test_layout_and_precision_can_change_between_calls() -> None:
    net = network("cnn", {"width": 4}, (1, 12, 12), 3, 2, "conv1x1")
    x = torch.randn(3, 1, 12, 12)
    expected = _ask(net, x)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(_ask(net, x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(_ask(net.double(), x.double()).float(), expected, rtol=1e-5, atol=1e-5)


def test_training_uses_batch_statistics_and_gives_gradients() -> None:
    net = network("cnn", {"width": 4}, (1, 12, 12), 3, 2, "conv1x1")
    x = torch.randn(4, 1, 12, 12)
    net(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    frozen = _ask(net, x)
    with torch.no_grad():
        assert not torch.allclose(net.train()(x), frozen)


def test_a_single_layer_in_training_mode_is_respected() -> None:
    net = network("cnn", {"width": 4}, (1, 12, 12), 3, 2, "conv1x1")
    norm = next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    before = norm.running_mean.clone()  # type: ignore[union-attr]
    norm.train()
    _ask(net, torch.randn(4, 1, 12, 12))
    assert not torch.equal(norm.running_mean, before)  # type: ignore[arg-type]


def test_hooks_inside_of_columns_see_what_they_would_see_in_the_loop() -> None:
    net = network("cnn", {"width": 4}, (1, 12, 12), 3, 2, "conv1x1")
    seen: list[Tensor] = []
    norm = next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    _ask(net, torch.randn(4, 1, 12, 12))
    assert [tuple(s.shape) for s in seen] == [(4, 4, 12, 12)]


def test_the_mean_adaptor_by_hand() -> None:
    joined = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    assert Adaptor("mean", [2, 2], 2, 2)(joined).tolist() == [[2.0, 4.0]]
    tokens = torch.tensor([[[1.0, 2.0, 3.0, 6.0]]])
    assert Adaptor("mean", [2, 2], 2, 3)(tokens).tolist() == [[[2.0, 4.0]]]


def test_attention_without_a_preference_is_the_mean() -> None:
    adaptor = Adaptor("attention", [2, 2], 2, 4)
    nn.init.zeros_(adaptor.query.weight)
    nn.init.zeros_(adaptor.query.bias)
    joined = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(adaptor(joined), Adaptor("mean", [2, 2], 2, 4)(joined))


def test_the_mixing_adaptor_takes_maps_of_different_widths() -> None:
    assert Adaptor("conv1x1", [2, 3], 4, 4)(torch.zeros(1, 5, 2, 2)).shape == (1, 4, 2, 2)


def _error(make: Any) -> tuple[str, str]:
    with pytest.raises(ModelError) as caught:
        make()
    return caught.value.what, caught.value.fix


def test_what_adaptors_cannot_do_is_said() -> None:
    assert _error(lambda: Adaptor("sum", [2], 2, 4)) == (
        'there is no adaptor "sum"',
        "use one of conv1x1, mean, attention",
    )
    assert _error(lambda: Adaptor("mean", [2, 3], 2, 4)) == (
        'the adaptor "mean" cannot join maps of [2, 3] channels into 2',
        "use adaptor: conv1x1 for clients with models of different widths",
    )


@pytest.mark.parametrize("mode", ["loop", "inference"])
def test_maps_that_do_not_fit_side_by_side_are_refused(mode: str) -> None:
    level = Level([Column(None, nn.AdaptiveAvgPool2d(2)), Column(None, nn.AdaptiveAvgPool2d(3))]).eval()
    with torch.set_grad_enabled(mode == "loop"):
        assert _error(lambda: level(torch.zeros(1, 4, 6, 6))) == (
            "blocks of one level end in maps that do not fit side by side: [(4, 2, 2), (4, 3, 3)]",
            "cut the clients' models at places of equal spatial size (method.points), or use other models",
        )


def test_columns_of_different_widths_give_the_numbers_of_the_loop() -> None:
    pieces = [
        cut_spec(spec("cnn", {"width": w}, input_shape=(1, 12, 12), num_classes=3, seed=w), 2).copy() for w in (4, 6)
    ]
    below = [own.interfaces[0][0] for own in pieces]
    columns = [Column(Adaptor("conv1x1", below, c, 4), own.blocks[1]) for c, own in zip(below, pieces, strict=True)]
    net = FusedBlocks([Level([Column(None, own.blocks[0]) for own in pieces]), Level(columns)]).eval()
    x = torch.randn(3, 1, 12, 12)
    torch.testing.assert_close(_ask(net, x), loop(net, x), rtol=1e-5, atol=1e-5)


def test_the_head_sees_the_mean_or_the_join() -> None:
    columns = [Column(None, nn.Linear(1, 1)), Column(None, nn.Linear(1, 1))]
    for column, weight in zip(columns, (2.0, 4.0), strict=True):
        nn.init.constant_(column.block.weight, weight)  # type: ignore[arg-type]
        nn.init.zeros_(column.block.bias)  # type: ignore[arg-type]
    x = torch.tensor([[1.0]])
    assert FusedBlocks([Level(columns)], features="concat")(x).tolist() == [[2.0, 4.0]]
    assert FusedBlocks([Level(columns)], features="mean")(x).tolist() == [[3.0]]
    what = _error(lambda: FusedBlocks([Level(columns)], features="sum"))
    assert what == ('there are no features "sum"', "use one of mean, concat")


def test_the_recipe_rebuilds_the_network() -> None:
    net = network("resnet", {"width": 4}, (3, 12, 12), 2, 2, "attention")
    net.head = nn.Linear(64, 3)
    again = build(net.recipe).eval()
    load_state(again, detached_state(net))
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(_ask(again, x), _ask(net, x))  # type: ignore[arg-type]
    assert again.recipe == net.recipe
