"""Which channels of a model can change places without changing what it computes.

A hidden channel is a row of the layer that makes it, a column of each layer that reads it, and an element of the
normalisation between them; a residual connection ties the channels of all that it adds. Channels that go through
anything else, as through the heads of an attention, and those of the input and the output, keep their places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.errors import ModelError
from fedfuse.models.channel_flow import Place as Place
from fedfuse.models.channel_flow import follow
from fedfuse.models.tracing import run, trace


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can be permuted, all places with the same permutation.

    Args:
        size: number of channels.
        places: where they are in the state dict.
        num_blocks: equal blocks of neighbours that must stay together, which group normalisation asks for; 1 is none.
        makers: names of the graph's nodes whose outputs have these channels, with the dimension that holds them.
    """

    size: int
    places: tuple[Place, ...]
    num_blocks: int
    makers: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Channels:
    """All that can be permuted in a model.

    Args:
        groups: from the input to the output, by their first maker.
        depths: name in the state dict to how deep a tensor lies: one of depth d has no axis of the groups from position
            d on, nor has any tensor that works before it; 1 more than there are groups for what makes the output.
        head: name of the linear layer at the model's end; empty if it ends in something else.
    """

    groups: tuple[ChannelGroup, ...]
    depths: Mapping[str, int]
    head: str


def find_channels(module: nn.Module, example: Tensor) -> Channels:
    """Find the channels of a model that can be permuted.

    Args:
        module: any module that can be traced.
        example: an input, shape ``(n, *input_shape)``.

    Returns:
        The groups; none for a model without hidden channels.

    Raises:
        ModelError: the module cannot be traced.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> [group] = find_channels(net, torch.zeros(1, 3)).groups
        >>> [(place.name, place.axis) for place in group.places]
        [('0.weight', 0), ('0.bias', 0), ('2.weight', 1)]
    """
    flow = follow(module, example)
    found = [g for g in flow.free_groups() if flow.size(g) > 1]
    groups = [ChannelGroup(flow.size(g), flow.places_of(g), flow.num_blocks(g), flow.makers_of(g)) for g in found]

    def depth(group: int) -> int:
        # Channels that keep their places lie between the free groups that were made before and after them.
        return sum(g <= group for g in found) + (group not in found)

    depths = {name: max(map(depth, flow.upstream(name)), default=0) for name in module.state_dict()}
    return Channels(tuple(groups), depths, flow.head)


def channels_of(spec: ModelSpec) -> Channels:
    """Find the channels of the model of a specification.

    Args:
        spec: the model.

    Returns:
        At least one group.

    Raises:
        ModelError: no channel can be permuted, or the model cannot be traced.
    """
    channels = find_channels(spec.build(), spec.example_input())
    if not channels.groups:
        raise ModelError(
            "the model has no hidden channels that can be matched",
            where="model",
            fix="use a model of linear or convolutional layers, or the method fedavg",
        )
    return channels


def permute(state: Mapping[str, Tensor], group: ChannelGroup, permutation: Tensor) -> dict[str, Tensor]:
    """Give the channels of one group other places; the model computes the same.

    Args:
        state: the model's state dict.
        group: of its channels.
        permutation: which channel comes to each place, shape ``(size,)``, int64.

    Returns:
        The new state dict; tensors that the group has no part in are not copied.
    """
    moved = dict(state)
    for place in group.places:
        index = permutation[:, None] * place.inner + torch.arange(place.inner)
        moved[place.name] = moved[place.name].index_select(place.axis, index.reshape(-1))
    return moved


def transport(state: Mapping[str, Tensor], group: ChannelGroup, plan: Tensor) -> dict[str, Tensor]:
    """Turn the channels of one group into mixtures of them, possibly more or fewer.

    A new channel is the weighted mean of its sources. What reads the channels shares each source's weight out to the
    targets that it went to, so that a layer of equal channels still adds up to the same.

    Args:
        state: the model's state dict.
        group: of its channels.
        plan: share of each new channel that comes from each old one, shape ``(new, old)``; rows sum to 1, columns to
            ``new / old``; a permutation matrix permutes.

    Returns:
        The new state dict; tensors that the group has no part in are not copied.
    """
    moved = dict(state)
    num_new, num_old = plan.shape
    for place in group.places:
        tensor = moved[place.name]
        mixing = plan.double() * (num_old / num_new) if place.consumes else plan.double()
        parts = tensor.movedim(place.axis, 0).double()
        mixed = (mixing @ parts.reshape(num_old, -1)).reshape(num_new * place.inner, *parts.shape[1:])
        moved[place.name] = mixed.movedim(0, place.axis).contiguous().to(tensor.dtype)
    return moved


def channel_rows(state: Mapping[str, Tensor], places: Sequence[Place]) -> Tensor:
    """All weights of each channel as one vector.

    Args:
        state: the model's state dict.
        places: some places of one group, at least one.

    Returns:
        Shape ``(size, d)``, float64.
    """
    rows = []
    for place in places:
        parts = state[place.name].movedim(place.axis, 0).double()
        rows.append(parts.reshape(parts.shape[0] // place.inner, -1))
    return torch.cat(rows, 1)


def made_places(channels: Channels, position: int) -> list[Place]:
    """Learned places of a group that make its channels and depend on no group behind it.

    Going through the groups in order with these, each is matched by weights whose inputs are matched already.

    Args:
        channels: of a model.
        position: of the group.
    """
    places = [p for p in settled_places(channels, position, position + 1) if not p.consumes]
    names = [place.name for place in channels.groups[position].places]
    # The other axis of a layer from the group into itself is not matched yet.
    return [place for place in places if names.count(place.name) == 1]


def settled_places(channels: Channels, position: int, stop: int) -> list[Place]:
    """Learned places of a group whose tensors have axes of the groups below ``stop`` only.

    Args:
        channels: of a model.
        position: of the group.
        stop: position behind the last group that counts.
    """
    later = {place.name for group in channels.groups[stop:] for place in group.places}
    return [p for p in channels.groups[position].places if p.is_learned and p.name not in later]


def channel_outputs(module: nn.Module, channels: Channels, x: Tensor) -> list[Tensor]:
    """What the channels of each group answer to some inputs, before normalisation and activation.

    Args:
        module: the model; not changed.
        channels: its channels.
        x: inputs, shape ``(n, *input_shape)``.

    Returns:
        For each group shape ``(size, num_answers)``, float64.
    """
    values = {node.name: value for node, value in run(module, trace(module), x).items()}
    return [
        torch.cat([values[name].movedim(dim, 0).flatten(1).double() for name, dim in group.makers], 1)
        for group in channels.groups
    ]
