"""Blocks of equal architecture side by side in one pass, for inference."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

# Layers that treat every channel, or every number, alone: on joined maps they are what they are on one.
_PER_CHANNEL: tuple[type[nn.Module], ...] = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_PER_NUMBER: tuple[type[nn.Module], ...] = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.GELU,
    nn.SiLU,
    nn.ELU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Hardswish,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
)
_RELU: tuple[Any, ...] = (torch.relu, F.relu)
_ADD: tuple[Any, ...] = (operator.add, operator.iadd, torch.add)


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
    builder = _Builder.of(blocks, ndim, shared)
    return None if builder is None else builder.build()


class _NoJoinedForm(Exception):  # noqa: N818
    """A block cannot run side by side with others."""


@dataclass
class _Value:
    """What is known of a value while steps are made: its form, and whether a step may overwrite it."""

    ndim: int
    is_shared: bool
    is_fresh: bool


class _Builder:
    """Makes the steps from the graph of one block and the layers of all."""

    def __init__(self, blocks: Sequence[fx.GraphModule], ndim: int, shared: bool) -> None:
        self.blocks, self.count = blocks, len(blocks)
        self.nodes = list(blocks[0].graph.nodes)
        self.known: dict[str, _Value] = {}
        self.entrance = _Value(ndim, shared and self.count > 1, False)
        self.steps: list[tuple[str, Callable[..., Tensor], tuple[str, ...]]] = []
        # A value under another name: what normalisation becomes when the convolution before it does it.
        self.alias: dict[str, str] = {}

    @classmethod
    def of(cls, blocks: Sequence[nn.Module], ndim: int, shared: bool) -> _Builder | None:
        graphs = [block for block in blocks if isinstance(block, fx.GraphModule)]
        if len(graphs) != len(blocks) or len({graph.code for graph in graphs}) != 1:
            return None
        return cls(graphs, ndim, shared)

    def build(self) -> Parallel | None:
        first = last = ""
        try:
            for node in self.nodes:
                if node.op == "placeholder":
                    first, self.known[node.name] = node.name, self.entrance
                elif node.op == "output":
                    last = self._name(node.args[0])
                elif node.name not in self.alias:
                    self._add(node)
        except _NoJoinedForm:
            return None
        if self.known[last].is_shared:
            return None
        needed: dict[str, int] = {name: i for i, (_, _, inputs) in enumerate(self.steps) for name in inputs}
        return Parallel(
            [
                _Step(name, run, inputs, tuple(sorted({n for n in inputs if needed[n] == i and n != last})))
                for i, (name, run, inputs) in enumerate(self.steps)
            ],
            first,
            last,
        )

    def _name(self, node: Any) -> str:
        if not isinstance(node, fx.Node):
            raise _NoJoinedForm
        return self.alias.get(node.name, node.name)

    def _put(self, node: fx.Node, run: Callable[..., Tensor], value: _Value, *inputs: str) -> None:
        self.known[node.name] = value
        self.steps.append((node.name, run, inputs))

    def _add(self, node: fx.Node) -> None:
        if node.kwargs and not (node.op == "call_function" and node.target in _RELU):
            raise _NoJoinedForm
        if node.op == "call_function" and node.target in _ADD and len(node.args) == 2:
            self._add_sum(node)
        elif node.op == "call_function" and node.target in _RELU:
            self._add_relu(node)
        elif node.op == "call_function" and node.target is torch.flatten and node.args[1:] in ((1,), (1, -1)):
            self._add_flatten(node)
        elif node.op == "call_module" and len(node.args) == 1:
            self._add_layer(node, [block.get_submodule(str(node.target)) for block in self.blocks])
        else:
            raise _NoJoinedForm

    def _add_sum(self, node: fx.Node) -> None:
        a, b = self._name(node.args[0]), self._name(node.args[1])
        left, right = self.known[a], self.known[b]
        if left.ndim != right.ndim or left.is_shared != right.is_shared or a == b:
            raise _NoJoinedForm
        value = _Value(left.ndim, left.is_shared, True)
        if left.is_fresh and self._is_last_use(node, 0):
            self._put(node, lambda x, y: x.add_(y), value, a, b)
        else:
            self._put(node, torch.add, value, a, b)

    def _is_last_use(self, node: fx.Node, argument: int) -> bool:
        source = node.args[argument]
        return isinstance(source, fx.Node) and len(source.users) == 1

    def _add_relu(self, node: fx.Node) -> None:
        name = self._name(node.args[0])
        before = self.known[name]
        run = F.relu_ if before.is_fresh and self._is_last_use(node, 0) else F.relu
        self._put(node, run, _Value(before.ndim, before.is_shared, True), name)

    def _add_flatten(self, node: fx.Node) -> None:
        name = self._name(node.args[0])
        before = self.known[name]
        if before.ndim == 3:
            # Tokens: the columns' channels are innermost and would be mixed with the others' tokens.
            raise _NoJoinedForm
        # A view of what came before may not be overwritten: others may see it.
        self._put(node, lambda x: x.flatten(1), _Value(2, before.is_shared, False), name)

    def _add_layer(self, node: fx.Node, layers: list[nn.Module]) -> None:
        kind, name = type(layers[0]), self._name(node.args[0])
        before = self.known[name]
        if any(type(layer) is not kind or _is_special(layer) for layer in layers):
            raise _NoJoinedForm
        if len({layer.extra_repr() for layer in layers}) != 1:
            raise _NoJoinedForm
        if kind is nn.ReLU:
            self._add_relu(node)
        elif kind in (nn.Identity, nn.Dropout, nn.Dropout2d):
            self._put(node, lambda x: x, _Value(before.ndim, before.is_shared, False), name)
        elif kind in _PER_NUMBER or (kind in _PER_CHANNEL and before.ndim == 4):
            self._put(node, layers[0], _Value(before.ndim, before.is_shared, kind not in _PER_NUMBER), name)
        elif isinstance(layers[0], nn.Flatten) and (layers[0].start_dim, layers[0].end_dim) == (1, -1):
            self._add_flatten(node)
        elif kind is nn.Conv2d and before.ndim == 4:
            self._add_convolution(node, layers, before, name)
        elif kind is nn.Linear and before.ndim == 2:
            run = self._shared_linear(layers) if before.is_shared else self._linear(layers)
            self._put(node, run, _Value(2, False, True), name)
        elif kind is nn.BatchNorm2d and before.ndim == 4 and not before.is_shared:
            scale, shift = (torch.cat(parts)[:, None, None] for parts in zip(*map(_affine, layers), strict=True))
            self._put(node, lambda x: torch.addcmul(shift, x, scale), _Value(4, False, True), name)
        elif kind is nn.GroupNorm and not before.is_shared and before.ndim == 4:
            self._put(node, self._group_norm(layers), _Value(4, False, True), name)
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
            _Value(4, False, True),
            name,
        )

    def _folded_norms(self, node: fx.Node) -> list[nn.BatchNorm2d]:
        """The normalisation that alone reads a convolution's output: it becomes part of the convolution."""
        user = next(iter(node.users), None)
        if len(node.users) != 1 or user is None or user.op != "call_module" or user.kwargs:
            return []
        norms = [block.get_submodule(str(user.target)) for block in self.blocks]
        found = [n for n in norms if type(n) is nn.BatchNorm2d and not _is_special(n)]
        if len(found) != self.count or len({norm.extra_repr() for norm in found}) != 1:
            return []
        self.alias[user.name] = node.name
        return found

    def _group_norm(self, layers: list[Any]) -> Callable[[Tensor], Tensor]:
        groups, eps = layers[0].num_groups * self.count, layers[0].eps
        weight, bias = _joined([x.weight for x in layers]), _joined([x.bias for x in layers])
        return lambda x: F.group_norm(x, groups, weight, bias, eps)

    def _shared_linear(self, layers: list[Any]) -> Callable[[Tensor], Tensor]:
        weight, bias = torch.cat([x.weight for x in layers]), _joined([x.bias for x in layers])
        return lambda x: F.linear(x, weight, bias)

    def _linear(self, layers: list[Any]) -> Callable[[Tensor], Tensor]:
        if self.count == 1:
            return self._shared_linear(layers)
        weight, bias = torch.stack([x.weight.T for x in layers]), _joined([x.bias for x in layers])

        def run(x: Tensor) -> Tensor:
            product = torch.bmm(x.unflatten(1, (len(weight), -1)).transpose(0, 1), weight)
            joined = product.transpose(0, 1).flatten(1)
            return joined if bias is None else joined.add_(bias)

        return run


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
