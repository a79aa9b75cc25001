"""Blocks of equal architecture side by side in one pass, for inference."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

# Layers that treat every channel, or every number, alone: on joined maps they are what they are on one.
_PER_CHANNEL: tuple[type[nn.Module], ...] = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_PER_NUMBER: tuple[type[nn.Module], ...] = (
    nn.ReLU6,
    nn.LeakyReLU,
    nn.GELU,
    nn.SiLU,
    nn.ELU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Hardswish,
)
_RELU: tuple[Any, ...] = (torch.relu, F.relu)
_ADD: tuple[Any, ...] = (operator.add, operator.iadd, torch.add)


Way = Literal["joined", "alone", "plain"]

JOINED_NUMBERS = 2**21
"""Largest size of a joined map for which one pass is faster; see benchmarks/fused_levels.py."""


@dataclass(frozen=True)
class _Step:
    """One operation on the joined maps.

    Args:
        name: where its result is kept.
        run: the operation on its inputs.
        inputs: names of its inputs.
        last_uses: names that nothing needs afterwards.
    """

    name: str
    run: Callable[..., Tensor]
    inputs: tuple[str, ...]
    last_uses: tuple[str, ...]


class Parallel:
    """Blocks of equal architecture, ready to run in one pass.

    It reads the blocks' weights when it is made and does not follow their later changes; make a new one instead, which
    costs about one copy of the weights.

    Args:
        steps: in order.
        first: name of the input.
        last: name of the output.
    """

    def __init__(self, steps: Sequence[_Step], first: str, last: str) -> None:
        self.steps, self.first, self.last = tuple(steps), first, last

    def __call__(self, x: Tensor) -> Tensor:
        """Run all blocks.

        Args:
            x: the joined inputs, or the shared one.

        Returns:
            The joined outputs; column ``m`` has the ``m``-th slice of the channels.
        """
        values = {self.first: x}
        for step in self.steps:
            values[step.name] = step.run(*(values[name] for name in step.inputs))
            for name in step.last_uses:
                # Memory that is given back at once is used again while it is in the cache.
                del values[name]
        return values[self.last]


def parallel(blocks: Sequence[nn.Module], *, ndim: int, shared: bool) -> Parallel | None:
    """Put blocks of equal architecture side by side, in evaluation mode and without gradients.

    Convolutions become one grouped convolution (one plain convolution where the input is shared), normalisation layers
    one over all channels or part of the convolution before them, linear layers one batched product.

    Args:
        blocks: what :func:`fedfuse.models.blocks.cut` made, in column order.
        ndim: dimensions of the input with the batch: 4 for maps ``(n, c, h, w)``, 2 for vectors ``(n, d)``.
        shared: all blocks get the same input; otherwise their inputs are joined over channels.

    Returns:
        What maps inputs to joined outputs; ``None`` where the blocks differ or hold a layer that has no joined form.
    """
    graphs = [block for block in blocks if isinstance(block, fx.GraphModule)]
    if len(graphs) != len(blocks) or len({graph.code for graph in graphs}) != 1:
        return None
    try:
        return _Builder(graphs, _Value(ndim, _in_channels(graphs[0]), shared and len(graphs) > 1, False)).build()
    except _NoJoinedForm:
        return None


def fastest_way(blocks: Sequence[nn.Module], x: Tensor) -> Way:
    """The way of running blocks on a CPU that was the fastest where it was measured.

    Both ways through :func:`parallel` copy the weights at each call, which pays where there is much to compute with
    each; a pass for all saves calls, but grouped convolutions lose to single ones where maps outgrow the cache. The
    answer depends on shapes only, so that equal inputs always go the same way and give the same bits.

    Args:
        blocks: side by side.
        x: the input that they share, or that of one of them, with the batch.

    Returns:
        ``joined``: one pass for all; ``alone``: each by itself with its normalisation in its convolutions; ``plain``:
        the blocks as they are.
    """
    first = next((p for p in blocks[0].parameters() if p.ndim > 1), None)
    if x.ndim != 4 or first is None or first.ndim != 4:
        return "plain"
    if sum(p.numel() for p in blocks[0].parameters()) > x.numel():
        return "plain"
    return "joined" if len(blocks) * first.shape[0] * x[:, 0].numel() <= JOINED_NUMBERS else "alone"


class _NoJoinedForm(Exception):
    """A block cannot run side by side with others."""


@dataclass(frozen=True)
class _Value:
    """What is known of a value while steps are made.

    Args:
        ndim: dimensions with the batch.
        channels: of one block; 0 where unknown.
        is_shared: the same for all blocks.
        is_fresh: nothing else sees its memory, so that a step may overwrite it.
    """

    ndim: int
    channels: int
    is_shared: bool
    is_fresh: bool

    def then(self, *, is_fresh: bool, channels: int | None = None) -> _Value:
        return replace(self, is_fresh=is_fresh, channels=self.channels if channels is None else channels)


class _Builder:
    """Makes the steps from the graph of one block and the layers of all."""

    def __init__(self, blocks: Sequence[fx.GraphModule], entrance: _Value) -> None:
        self.blocks, self.count, self.entrance = blocks, len(blocks), entrance
        self.known: dict[str, _Value] = {}
        self.steps: list[tuple[str, Callable[..., Tensor], tuple[str, ...]]] = []
        # A value under another name: what normalisation becomes when the convolution before it does it.
        self.alias: dict[str, str] = {}

    def build(self) -> Parallel:
        first = last = ""
        for node in self.blocks[0].graph.nodes:
            if node.op == "placeholder":
                first, self.known[node.name] = node.name, self.entrance
            elif node.op == "output":
                last = self._name(node.args[0])
            elif node.name not in self.alias:
                self._add(node)
        if self.known[last].is_shared:
            raise _NoJoinedForm
        needed = {name: i for i, (_, _, inputs) in enumerate(self.steps) for name in inputs}
        steps = [
            _Step(name, run, inputs, tuple(sorted({n for n in inputs if needed[n] == i and n != last})))
            for i, (name, run, inputs) in enumerate(self.steps)
        ]
        return Parallel(steps, first, last)

    def _name(self, node: Any) -> str:
        if not isinstance(node, fx.Node):
            raise _NoJoinedForm
        return self.alias.get(node.name, node.name)

    def _put(self, node: fx.Node, run: Callable[..., Tensor], value: _Value, *inputs: str) -> None:
        self.known[node.name] = value
        self.steps.append((node.name, run, inputs))

    def _add(self, node: fx.Node) -> None:
        is_function = node.op == "call_function"
        if {key: value for key, value in node.kwargs.items() if (key, value) != ("inplace", False)}:
            raise _NoJoinedForm
        if is_function and node.target in _ADD and len(node.args) == 2:
            self._add_sum(node)
        elif is_function and node.target in _RELU and len(node.args) == 1:
            self._add_relu(node)
        elif is_function and node.target is torch.flatten and node.args[1:] in ((1,), (1, -1)):
            self._add_flatten(node)
        elif node.op == "call_module" and len(node.args) == 1:
            self._add_layer(node, [block.get_submodule(str(node.target)) for block in self.blocks])
        else:
            raise _NoJoinedForm

    def _may_overwrite(self, node: fx.Node) -> bool:
        """Whether nothing but this operation needs its first input."""
        source = node.args[0]
        return isinstance(source, fx.Node) and len(source.users) == 1 and self.known[self._name(source)].is_fresh

    def _add_sum(self, node: fx.Node) -> None:
        a, b = self._name(node.args[0]), self._name(node.args[1])
        left, right = self.known[a], self.known[b]
        # Channels that are broadcast would be broadcast over other columns.
        if (left.ndim, left.channels, left.is_shared) != (right.ndim, right.channels, right.is_shared) or a == b:
            raise _NoJoinedForm
        overwrites = self._may_overwrite(node)
        if not left.channels or (node.target is operator.iadd and not overwrites):
            raise _NoJoinedForm
        self._put(node, _add_onto if overwrites else torch.add, left.then(is_fresh=True), a, b)

    def _add_relu(self, node: fx.Node) -> None:
        name = self._name(node.args[0])
        self._put(node, F.relu_ if self._may_overwrite(node) else F.relu, self.known[name].then(is_fresh=True), name)

    def _add_flatten(self, node: fx.Node) -> None:
        name = self._name(node.args[0])
        before = self.known[name]
        if before.ndim not in (2, 4):
            # Tokens: the columns' channels are innermost and would be mixed with the others' tokens.
            raise _NoJoinedForm
        # A view of what came before may not be overwritten: others may see it.
        self._put(node, lambda x: x.flatten(1), _Value(2, 0, before.is_shared, False), name)

    def _add_layer(self, node: fx.Node, layers: list[nn.Module]) -> None:
        one, kind, name = layers[0], type(layers[0]), self._name(node.args[0])
        before = self.known[name]
        if any(type(x) is not kind or _settings(x) != _settings(one) or _is_special(x) for x in layers):
            raise _NoJoinedForm
        is_map, is_joined = before.ndim == 4, not before.is_shared
        if kind in (nn.Identity, nn.Dropout, nn.Dropout2d):
            self._put(node, lambda x: x, before.then(is_fresh=False), name)
        elif getattr(one, "inplace", False) and not self._may_overwrite(node):
            # What others read afterwards would have to change too.
            raise _NoJoinedForm
        elif kind is nn.ReLU:
            self._add_relu(node)
        elif kind in _PER_NUMBER:
            self._put(node, one, before.then(is_fresh=False), name)
        elif kind in _PER_CHANNEL and is_map:
            self._put(node, one, before.then(is_fresh=True), name)
        elif isinstance(one, nn.Flatten) and (one.start_dim, one.end_dim) == (1, -1):
            self._add_flatten(node)
        elif kind is nn.Conv2d and is_map:
            self._add_convolution(node, layers, before, name)
        elif isinstance(one, nn.Linear) and kind is nn.Linear and before.ndim == 2:
            run = _shared_linear(layers) if before.is_shared or self.count == 1 else _linear(layers)
            self._put(node, run, _Value(2, one.out_features, False, True), name)
        elif kind is nn.BatchNorm2d and is_map and is_joined:
            self._put(node, _batch_norm(layers), before.then(is_fresh=True), name)
        elif kind is nn.GroupNorm and is_map and is_joined:
            self._put(node, _group_norm(layers), before.then(is_fresh=True), name)
        else:
            raise _NoJoinedForm

    def _add_convolution(self, node: fx.Node, layers: list[Any], before: _Value, name: str) -> None:
        one = layers[0]
        if one.padding_mode != "zeros" or (before.is_shared and one.groups > 1):
            raise _NoJoinedForm
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        norms = self._folded_norms(node)
        if norms:
            affine = [_affine(norm) for norm in norms]
            weights = [w * scale[:, None, None, None] for w, (scale, _) in zip(weights, affine, strict=True)]
            biases = [
                shift if bias is None else shift + bias * scale
                for bias, (scale, shift) in zip(biases, affine, strict=True)
            ]
        weight = torch.cat(weights)
        bias = None if biases[0] is None else torch.cat(biases)
        groups = 1 if before.is_shared else one.groups * self.count
        self._put(
            node,
            lambda x: F.conv2d(x, weight, bias, one.stride, one.padding, one.dilation, groups),
            _Value(4, one.out_channels, False, True),
            name,
        )

    def _folded_norms(self, node: fx.Node) -> list[nn.BatchNorm2d]:
        """The normalisation that alone reads a convolution's output: it becomes part of the convolution."""
        user = next(iter(node.users), None)
        if len(node.users) != 1 or user is None or user.op != "call_module" or user.kwargs:
            return []
        norms = [block.get_submodule(str(user.target)) for block in self.blocks]
        found = [n for n in norms if type(n) is nn.BatchNorm2d and not _is_special(n)]
        if len(found) != self.count or any(_settings(n) != _settings(found[0]) for n in found):
            return []
        self.alias[user.name] = node.name
        return found


def _add_onto(x: Tensor, y: Tensor) -> Tensor:
    return x.add_(y) if x.shape == y.shape else x + y


def _batch_norm(layers: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    scale, shift = (torch.cat(parts)[:, None, None] for parts in zip(*map(_affine, layers), strict=True))
    return lambda x: torch.addcmul(shift, x, scale)


def _group_norm(layers: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    groups, eps = layers[0].num_groups * len(layers), layers[0].eps
    weight, bias = _joined([x.weight for x in layers]), _joined([x.bias for x in layers])
    return lambda x: F.group_norm(x, groups, weight, bias, eps)


def _shared_linear(layers: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    weight, bias = torch.cat([x.weight for x in layers]), _joined([x.bias for x in layers])
    return lambda x: F.linear(x, weight, bias)


def _linear(layers: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    weight, bias = torch.stack([x.weight for x in layers]).transpose(1, 2), _joined([x.bias for x in layers])

    def run(x: Tensor) -> Tensor:
        product = torch.bmm(x.unflatten(1, (len(layers), -1)).transpose(0, 1), weight)
        joined = product.transpose(0, 1).flatten(1)
        return joined if bias is None else joined.add_(bias)

    return run


def _in_channels(block: fx.GraphModule) -> int:
    """Channels that a block takes, as the layers that read its input say; 0 where none does."""
    entrance = next(node for node in block.graph.nodes if node.op == "placeholder")
    for user in entrance.users:
        layer = block.get_submodule(str(user.target)) if user.op == "call_module" else None
        if isinstance(layer, nn.Conv2d):
            return layer.in_channels
        if isinstance(layer, nn.Linear):
            return layer.in_features
    return 0


def _settings(layer: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(layer).items() if not key.startswith("_")}


def _is_special(layer: nn.Module) -> bool:
    """A layer does more, or something else, than its class says in evaluation mode."""
    watched = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    without_statistics = isinstance(layer, nn.BatchNorm2d) and layer.running_mean is None
    return bool(watched) or layer.training or without_statistics


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift per channel that a BatchNorm layer is in evaluation mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.affine:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift + norm.bias if norm.affine else shift


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    kept = [part for part in parts if part is not None]
    return torch.cat(kept) if len(kept) == len(parts) else None
