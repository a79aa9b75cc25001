"""Channels that change places: the model must compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.errors import ModelError
from fedfuse.models import spec
from fedfuse.models.permuting import (
    ChannelGroup,
    Channels,
    channel_outputs,
    channel_rows,
    channels_of,
    find_channels,
    made_places,
    permute,
    settled_places,
    transport,
)

IMAGE = (3, 8, 8)


def restless(module: nn.Module, seed: int = 0) -> nn.Module:
    """Other weights and statistics than those of the beginning, where many are equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(noise + 0.5 if name.endswith("running_var") else tensor + 0.2 * noise)
    return module.eval()


def shuffle(group: ChannelGroup, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    per_block = group.size // group.num_blocks
    blocks = torch.randperm(group.num_blocks, generator=generator) * per_block
    return torch.cat([b + torch.randperm(per_block, generator=generator) for b in blocks])


def shuffled(module: nn.Module, channels: Channels) -> dict[str, Tensor]:
    state = dict(module.state_dict())
    for seed, group in enumerate(channels.groups):
        state = permute(state, group, shuffle(group, seed + 1))
    return state


def assert_same_function(module: nn.Module, input_shape: tuple[int, ...]) -> Channels:
    restless(module)
    x = torch.rand(4, *input_shape, generator=torch.Generator().manual_seed(9))
    channels = find_channels(module, x)
    before, state = {k: t.clone() for k, t in module.state_dict().items()}, shuffled(module, channels)
    with torch.no_grad():
        wanted = module(x)
        module.load_state_dict(state)
        found = module(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    for group in channels.groups:
        assert any(not torch.equal(before[place.name], state[place.name]) for place in group.places)
    return channels


@pytest.mark.parametrize(
    ("family", "settings", "num_groups"),
    [
        ("mlp", {"width": 12, "depth": 3}, 3),
        ("cnn", {"width": 8, "depth": 4, "norm": "batch"}, 4),
        ("cnn", {"width": 16, "depth": 2, "norm": "group"}, 2),
        ("cnn", {"width": 8, "depth": 2, "norm": "none"}, 2),
        # 8 blocks with one hidden map each, and one stream of channels in each of the 4 stages.
        ("resnet", {"width": 4, "depth": 18, "norm": "batch"}, 12),
        ("resnet", {"width": 4, "depth": 18, "norm": "group"}, 12),
        ("resnet", {"width": 4, "depth": 50, "stem": "imagenet"}, 37),
        # The stream of tokens and the perceptron of each block; what enters the heads keeps its places.
        ("vit", {"width": 8, "depth": 2, "heads": 2}, 3),
        ("vit", {"width": 8, "depth": 2, "heads": 2, "pool": "token"}, 2),
    ],
)
def test_permuted_channels_compute_the_same(family: str, settings: dict[str, Any], num_groups: int) -> None:
    model = spec(family, settings, input_shape=IMAGE, num_classes=5, seed=1)
    assert len(assert_same_function(model.build(), IMAGE).groups) == num_groups


def test_the_places_of_a_small_network_by_hand() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)
    )
    [group] = find_channels(net, torch.zeros(2, 1, 8, 8)).groups
    assert (group.size, group.num_blocks, group.makers) == (4, 1, (("_0", 1),))
    assert [(p.name, p.axis, p.inner, p.consumes, p.is_learned) for p in group.places] == [
        ("0.weight", 0, 1, False, True),
        ("1.weight", 0, 1, False, True),
        ("1.bias", 0, 1, False, True),
        ("1.running_mean", 0, 1, False, False),
        ("1.running_var", 0, 1, False, False),
        ("4.weight", 1, 36, True, True),
    ]


def test_a_permutation_by_hand() -> None:
    net = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))
    [group] = find_channels(net, torch.zeros(1, 1)).groups
    state = {
        "0.weight": torch.tensor([[1.0], [2.0]]),
        "0.bias": torch.tensor([3.0, 4.0]),
        "1.weight": torch.tensor([[5.0, 6.0]]),
        "1.bias": torch.tensor([7.0]),
    }
    moved = permute(state, group, torch.tensor([1, 0]))
    assert moved["0.weight"].tolist() == [[2], [1]]
    assert moved["0.bias"].tolist() == [4, 3]
    assert moved["1.weight"].tolist() == [[6, 5]]
    assert moved["1.bias"] is state["1.bias"]
    assert channel_rows(state, group.places).tolist() == [[1, 3, 5], [2, 4, 6]]


def test_depths_follow_the_graph_and_not_the_groups() -> None:
    model = spec("resnet", {"width": 4, "depth": 18}, input_shape=IMAGE, num_classes=5, seed=1)
    channels = channels_of(model)
    depths = channels.depths
    assert channels.head == "13"
    assert (depths["0.weight"], depths["1.running_mean"], depths["1.num_batches_tracked"]) == (1, 1, 1)
    # The first block's first layer needs its own hidden channels; the normalisation behind the block needs them too,
    # although it holds channels of the stream only.
    assert (depths["3.body.0.weight"], depths["3.body.4.weight"], depths["3.body.4.num_batches_tracked"]) == (2, 2, 2)
    assert depths["13.weight"] == len(channels.groups) + 1


def test_places_that_are_settled_and_those_that_make() -> None:
    model = spec("mlp", {"width": 4, "depth": 2}, input_shape=IMAGE, num_classes=3, seed=1)
    channels = channels_of(model)
    assert [p.name for p in made_places(channels, 0)] == ["1.weight", "1.bias"]
    assert [p.name for p in made_places(channels, 1)] == ["3.weight", "3.bias"]
    assert [p.name for p in settled_places(channels, 0, 1)] == ["1.weight", "1.bias"]
    assert [p.name for p in settled_places(channels, 0, 2)] == ["1.weight", "1.bias", "3.weight"]


def test_split_channels_are_merged_back_exactly() -> None:
    narrow = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 4))
    [group] = find_channels(narrow, torch.zeros(1, 3)).groups
    state = narrow.state_dict()
    wide = {
        "0.weight": state["0.weight"].repeat_interleave(2, 0),
        "0.bias": state["0.bias"].repeat_interleave(2, 0),
        "2.weight": state["2.weight"].repeat_interleave(2, 1) / 2,
        "2.bias": state["2.bias"],
    }
    plan = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    merged = transport(wide, group, plan)
    for name, tensor in state.items():
        torch.testing.assert_close(merged[name], tensor)
    # And the other way round.
    torch.testing.assert_close(transport(state, group, plan.T * 2), wide)


def test_a_permutation_matrix_transports_as_its_permutation() -> None:
    model = spec("cnn", {"width": 4, "depth": 2}, input_shape=IMAGE, num_classes=3, seed=1)
    state, order = restless(model.build()).state_dict(), torch.tensor([2, 0, 3, 1])
    group = channels_of(model).groups[0]
    torch.testing.assert_close(transport(state, group, torch.eye(4)[order]), permute(state, group, order))


def test_outputs_follow_their_channels() -> None:
    model = spec("resnet", {"width": 4, "depth": 18}, input_shape=IMAGE, num_classes=3, seed=1)
    module, x = restless(model.build()), torch.rand(3, *IMAGE, generator=torch.Generator().manual_seed(2))
    channels = channels_of(model)
    before = channel_outputs(module, channels, x)
    module.load_state_dict(shuffled(module, channels))
    after = channel_outputs(module, channels, x)
    for seed, (group, old, new) in enumerate(zip(channels.groups, before, after, strict=True)):
        wanted = old[shuffle(group, seed + 1)]
        torch.testing.assert_close(new, wanted, rtol=1e-5, atol=1e-5 * float(old.abs().max()))
        assert old.shape[0] == group.size


class Odd(nn.Module):
    """Steps that users' models take."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.slope = nn.PReLU(6)
        self.depthwise = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.norm = nn.BatchNorm2d(12)
        self.point = nn.Conv2d(12, 6, 1)
        self.scale = nn.Parameter(torch.ones(1, 6, 1, 1))
        self.squeeze, self.excite = nn.Linear(6, 4), nn.Linear(4, 6)
        self.up = nn.ConvTranspose2d(6, 8, 2, stride=2)
        self.group = nn.GroupNorm(4, 8)
        self.tokens = nn.LayerNorm(8)
        self.hidden, self.out = nn.Linear(8, 10), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.slope(self.stem(x))
        y = self.point(self.norm(self.depthwise(x))) * self.scale
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3))))))
        x = x + y * gate.view(x.shape[0], -1, 1, 1)
        x = F.max_pool2d(self.group(self.up(x)).relu(), 2)
        tokens = self.tokens(x.flatten(2).transpose(1, 2))
        return self.out(self.hidden(tokens).relu().mean(dim=1))


def test_odd_steps_are_followed() -> None:
    channels = assert_same_function(Odd(), IMAGE)
    # The stream (stem, point, scale, excite; the depthwise map belongs to it), squeeze, up, hidden.
    assert [(group.size, group.num_blocks) for group in channels.groups] == [(6, 1), (4, 1), (8, 4), (10, 1)]
    assert ("depthwise.weight", 0, 2) in [(p.name, p.axis, p.inner) for p in channels.groups[0].places]
    assert ("scale", 1, 1) in [(p.name, p.axis, p.inner) for p in channels.groups[0].places]


class Stubborn(nn.Module):
    """Steps behind which channels must keep their places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.third = nn.Conv2d(8, 6, 1)
        self.tied = nn.Linear(6, 6)
        self.fourth, self.out = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(torch.cat([self.first(x), self.second(x)], 1))
        x = self.third(x).amax((2, 3))
        # The same weights twice, the second time in a way of which nothing is known.
        x = F.linear(self.tied(x), self.tied.weight)
        return self.out(self.fourth(x).cumsum(0))


def test_what_is_not_known_keeps_its_places() -> None:
    channels = assert_same_function(Stubborn(), IMAGE)
    assert channels.groups == ()


class Repeated(nn.Module):
    """One layer used again and again ties its inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.out = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = x + self.again(x).tanh()
        return self.out(x)


def test_a_layer_from_a_group_into_itself_moves_on_both_axes() -> None:
    channels = assert_same_function(Repeated(), (3,))
    [group] = channels.groups
    assert [(p.name, p.axis) for p in group.places if p.name == "again.weight"] == [
        ("again.weight", 0),
        ("again.weight", 1),
    ]
    assert [p.name for p in made_places(channels, 0)] == ["first.weight", "first.bias", "again.bias"]


def test_a_layer_with_weights_of_its_own_kind_keeps_its_channels() -> None:
    net = nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2)
    )
    assert assert_same_function(net, (3,)).groups == ()


def test_two_names_of_one_tensor_move_together() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    net[4].weight = net[2].weight
    channels = assert_same_function(net, (3,))
    assert [sorted({p.name for p in g.places}) for g in channels.groups] == [
        ["0.bias", "0.weight", "2.bias", "2.weight", "4.bias", "4.weight", "5.weight"]
    ]


def test_a_model_without_hidden_channels_is_refused() -> None:
    recipe = {"kind": "opaque"}
    model = ModelSpec(recipe=recipe, seed=0, input_shape=(3,), num_classes=2, template=nn.Linear(3, 2))
    with pytest.raises(ModelError) as caught:
        channels_of(model)
    assert str(caught.value) == (
        "the model has no hidden channels that can be matched\n"
        "  where: model\n"
        "  fix:   use a model of linear or convolutional layers, or the method fedavg"
    )
