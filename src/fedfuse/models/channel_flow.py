"""Follow the channels of a traced model from layer to layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedfuse.models.channel_kinds import function_name, has_tensors, kind_of_call, kind_of_layer
from fedfuse.models.tracing import run, submodule, trace


@dataclass(frozen=True)
class Place:
    """One axis of one tensor that is indexed by the channels of a group.

    Args:
        name: in the state dict.
        axis: of the tensor.
        inner: neighbouring positions of that axis per channel: height times width behind a flattened map, else 1.
        consumes: whether the channels are read there, not made.
        is_learned: whether the tensor is a parameter, not a buffer.
    """

    name: str
    axis: int
    inner: int
    consumes: bool
    is_learned: bool


@dataclass(frozen=True)
class _Axis:
    """The dimension of a value that holds channels."""

    dim: int
    group: int
    inner: int


def follow(module: nn.Module, example: Tensor) -> Flow:
    """Trace a module and follow its channels.

    Args:
        module: not changed.
        example: an input, shape ``(n, *input_shape)``.

    Returns:
        What was found.

    Raises:
        ModelError: the module cannot be traced.
    """
    graph = trace(module)
    flow = Flow(module, run(module, graph, example))
    for node in graph.nodes:
        flow.visit(node)
    flow.finish()
    return flow


@dataclass
class Flow:
    """Groups of channels while they are found; a group is a number, and groups that turn out to be one are joined.

    Args:
        module: what was traced.
        values: of each node, for the shapes.
    """

    module: nn.Module
    values: dict[fx.Node, Any]
    head: str = ""
    _axes: dict[fx.Node, _Axis | None] = field(default_factory=dict)
    _seen: dict[fx.Node, frozenset[int]] = field(default_factory=dict)
    _parents: list[int] = field(default_factory=list)
    _sizes: list[int] = field(default_factory=list)
    _pinned: set[int] = field(default_factory=set)
    _blocks: list[tuple[int, int]] = field(default_factory=list)
    _places: dict[tuple[str, int], tuple[_Axis | None, bool]] = field(default_factory=dict)
    _makers: list[tuple[int, str, int]] = field(default_factory=list)
    _upstream: dict[str, frozenset[int]] = field(default_factory=dict)
    _fixed_names: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._tensors = self.module.state_dict(keep_vars=True)
        # A tensor with two names is one tensor.
        self._names: dict[int, list[str]] = {}
        for name, tensor in self._tensors.items():
            self._names.setdefault(id(tensor), []).append(name)

    # What was found.

    def free_groups(self) -> list[int]:
        """Groups that can be permuted, in the order of the graph."""
        pinned = {self._root(g) for g in self._pinned}
        return [g for g in range(len(self._parents)) if self._root(g) == g and g not in pinned]

    def size(self, group: int) -> int:
        """Channels of a group.

        Args:
            group: its number.
        """
        return self._sizes[group]

    def num_blocks(self, group: int) -> int:
        """Blocks that must stay together.

        Args:
            group: its number.
        """
        return next((count for g, count in self._blocks if self._root(g) == group), 1)

    def makers_of(self, group: int) -> tuple[tuple[str, int], ...]:
        """Nodes that make the channels of a group, with the dimension that holds them.

        Args:
            group: its number.
        """
        return tuple((name, dim) for g, name, dim in self._makers if self._root(g) == group)

    def places_of(self, group: int) -> tuple[Place, ...]:
        """Places of a group, under all names.

        Args:
            group: its number.
        """
        return tuple(
            Place(alias, axis, channels.inner, consumes, isinstance(self._tensors[name], nn.Parameter))
            for (name, axis), (channels, consumes) in self._places.items()
            if channels is not None and self._root(channels.group) == group
            for alias in self._names[id(self._tensors[name])]
        )

    def upstream(self, name: str) -> set[int]:
        """Groups that a tensor of the state dict works on or behind.

        Args:
            name: of the tensor.
        """
        return {self._root(g) for g in self._upstream.get(self._canonical(name), frozenset())}

    def finish(self) -> None:
        """Settle what can be known at the end only."""
        for (name, _), (channels, _) in self._places.items():
            if channels is not None and name in self._fixed_names:
                self._pinned.add(channels.group)
        counts: dict[int, int] = {}
        for group, count in self._blocks:
            if counts.setdefault(self._root(group), count) != count:
                self._pinned.add(group)

    # Groups.

    def _root(self, group: int) -> int:
        while self._parents[group] != group:
            group = self._parents[group]
        return group

    def _new(self, size: int) -> int:
        self._parents.append(len(self._parents))
        self._sizes.append(size)
        return len(self._parents) - 1

    def _join(self, a: _Axis, b: _Axis) -> None:
        first, second = sorted((self._root(a.group), self._root(b.group)))
        if self._sizes[first] != self._sizes[second] or a.inner != b.inner:
            self._pinned |= {first, second}
        else:
            self._parents[second] = first

    def _pin(self, axis: _Axis | None) -> None:
        if axis is not None:
            self._pinned.add(axis.group)

    def _canonical(self, name: str) -> str:
        return self._names[id(self._tensors[name])][0]

    def _bind(self, node: fx.Node, name: str, axis: int, channels: _Axis | None, consumes: bool = False) -> None:
        """An axis of a tensor is indexed by these channels; ``None``: by something that keeps its places."""
        if name not in self._tensors:
            return
        name = self._canonical(name)
        if (name, axis) not in self._places:
            self._places[name, axis] = (channels, consumes)
        else:
            known = self._places[name, axis][0]
            if known is None or channels is None:
                self._pin(known)
                self._pin(channels)
            else:
                self._join(known, channels)
        self._goes_behind(node, name, frozenset() if channels is None else frozenset({channels.group}))

    def _goes_behind(self, node: fx.Node, name: str, new: frozenset[int] = frozenset()) -> None:
        name = self._canonical(name)
        self._upstream[name] = self._upstream.get(name, frozenset()) | self._inputs_seen(node) | new

    def _inputs_seen(self, node: fx.Node) -> frozenset[int]:
        return frozenset().union(*(self._seen.get(n, frozenset()) for n in node.all_input_nodes))

    # The graph.

    def visit(self, node: fx.Node) -> None:
        """Follow the channels through one node.

        Args:
            node: all nodes before it are done.
        """
        if node.op == "output":
            for source in node.all_input_nodes:
                self._pin(self._axes[source])
                if isinstance(submodule(self.module, source), nn.Linear):
                    self.head = str(source.target)
            return
        rule = self._rule(node) if node.op.startswith("call_") else None
        axis = rule(node) if rule is not None else self._give_up(node) if node.op.startswith("call_") else None
        self._axes[node] = axis
        self._seen[node] = self._inputs_seen(node) | (frozenset() if axis is None else {axis.group})

    def _rule(self, node: fx.Node) -> Callable[[fx.Node], _Axis | None] | None:
        if not has_tensors(self.values[node]):
            return lambda _: None
        layer = submodule(self.module, node)
        kind = kind_of_call(node) if layer is None else kind_of_layer(layer, self._own_names(node))
        if kind == "elementwise" and len(list(self._tensor_inputs(node))) > 1:
            return None
        rule: Callable[[fx.Node], _Axis | None] | None = getattr(self, f"_{kind}", None)
        return rule

    def _own_names(self, node: fx.Node) -> set[str]:
        prefix = f"{node.target}."
        return {name.removeprefix(prefix) for name in self._tensors if name.startswith(prefix)}

    def _tensor_inputs(self, node: fx.Node) -> Iterator[fx.Node]:
        return (n for n in node.all_input_nodes if has_tensors(self.values[n]))

    def _give_up(self, node: fx.Node) -> _Axis | None:
        """Nothing is known of this step, so what enters it must keep its places."""
        for source in node.all_input_nodes:
            self._pin(self._axes[source])
            self._fix_attribute(source)
        layer = submodule(self.module, node)
        for name, _ in (*layer.named_parameters(), *layer.named_buffers()) if layer is not None else ():
            full = f"{node.target}.{name}"
            if full in self._tensors:
                self._fixed_names.add(self._canonical(full))
                self._goes_behind(node, full)
        return None

    def _fix_attribute(self, source: fx.Node) -> None:
        if source.op == "get_attr" and str(source.target) in self._tensors:
            self._fixed_names.add(self._canonical(str(source.target)))

    # Rules: from the channels of a node's inputs to those of its output.

    def _only_input(self, node: fx.Node) -> tuple[fx.Node, _Axis | None]:
        source = node.all_input_nodes[0]
        self._fix_attribute(source)
        return source, self._axes[source]

    def _elementwise(self, node: fx.Node) -> _Axis | None:
        return self._only_input(node)[1]

    def _spatial(self, node: fx.Node) -> _Axis | None:
        source, axis = self._only_input(node)
        if axis is None or (axis.dim == 1 and self.values[source].ndim == self.values[node].ndim > 2):
            return axis
        return self._give_up(node)

    def _linear(self, node: fx.Node) -> _Axis | None:
        layer = submodule(self.module, node)
        _, axis = self._only_input(node)
        out = self.values[node]
        dim = out.ndim - 1 if isinstance(layer, nn.Linear) else 1
        if axis is not None and axis.dim != dim:
            self._pin(axis)
            axis = None
        # Transposed convolutions have their inputs first.
        made, read = (1, 0) if isinstance(layer, nn.modules.conv._ConvTransposeNd) else (0, 1)
        new = _Axis(dim, self._new(out.shape[dim]), 1)
        self._makers.append((new.group, node.name, dim))
        self._bind(node, f"{node.target}.weight", made, new)
        self._bind(node, f"{node.target}.bias", 0, new)
        self._bind(node, f"{node.target}.weight", read, axis, consumes=True)
        return new

    def _depthwise(self, node: fx.Node) -> _Axis | None:
        source, axis = self._only_input(node)
        if axis is not None and axis.dim != 1:
            return self._give_up(node)
        if axis is not None:
            multiplier = self.values[node].shape[1] // self.values[source].shape[1]
            axis = _Axis(1, axis.group, axis.inner * multiplier)
        self._bind(node, f"{node.target}.weight", 0, axis)
        self._bind(node, f"{node.target}.bias", 0, axis)
        return axis

    def _norm(self, node: fx.Node) -> _Axis | None:
        layer = submodule(self.module, node)
        source, axis = self._only_input(node)
        dim = 1
        if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
            dim = self.values[source].ndim - 1 if len(layer.normalized_shape) == 1 else -1
        if axis is not None and axis.dim != dim:
            return self._give_up(node)
        if isinstance(layer, nn.GroupNorm) and axis is not None and 1 < layer.num_groups < layer.num_channels:
            if axis.inner != 1:
                return self._give_up(node)
            self._blocks.append((axis.group, layer.num_groups))
        # One slope for all channels belongs to none of them.
        if not (isinstance(layer, nn.PReLU) and layer.num_parameters == 1):
            for name in ("weight", "bias", "running_mean", "running_var"):
                self._bind(node, f"{node.target}.{name}", 0, axis)
        for name in self._own_names(node):
            self._goes_behind(node, f"{node.target}.{name}")
        return axis

    def _reshape(self, node: fx.Node) -> _Axis | None:
        source, axis = self._only_input(node)
        if axis is None:
            return None
        before, after = self.values[source].shape, self.values[node].shape
        for dim, size in enumerate(after):
            # In row-major order the channels begin where as many rows lie before them as before.
            begins_here = math.prod(after[:dim]) == math.prod(before[: axis.dim])
            if begins_here and size % before[axis.dim] == 0:
                return _Axis(dim, axis.group, axis.inner * (size // before[axis.dim]))
        return self._give_up(node)

    def _reduction(self, node: fx.Node) -> _Axis | None:
        source, axis = self._only_input(node)
        if axis is None:
            return None
        ndim = self.values[source].ndim
        given = node.kwargs.get("dim", node.args[1:2] or None)
        numbers = torch.utils._pytree.tree_leaves(given)
        if not numbers or not all(isinstance(d, int) for d in numbers):
            return self._give_up(node)
        gone = {d % ndim for d in numbers}
        if axis.dim in gone:
            return self._give_up(node)
        keeps = self.values[node].ndim == ndim
        return _Axis(axis.dim if keeps else axis.dim - sum(d < axis.dim for d in gone), axis.group, axis.inner)

    def _transpose(self, node: fx.Node) -> _Axis | None:
        source, axis = self._only_input(node)
        if axis is None:
            return None
        ndim = self.values[source].ndim
        numbers = torch.utils._pytree.tree_leaves(node.args[1:])
        if node.kwargs or not all(isinstance(d, int) for d in numbers):
            return self._give_up(node)
        order = [d % ndim for d in numbers]
        if function_name(node) == "transpose":
            swapped = list(range(ndim))
            swapped[order[0]], swapped[order[1]] = order[1], order[0]
            order = swapped
        return _Axis(order.index(axis.dim), axis.group, axis.inner)

    def _binary(self, node: fx.Node) -> _Axis | None:
        """Sums and products tie the channels of both sides, counted from the last dimension as broadcasting does."""
        out = self.values[node]
        sources = list(self._tensor_inputs(node))
        tracked = [(s, axis) for s in sources if (axis := self._axes[s]) is not None]
        placed = [_Axis(a.dim + out.ndim - self.values[s].ndim, a.group, a.inner) for s, a in tracked]
        if not placed or any(axis.dim != placed[0].dim for axis in placed):
            return self._give_up(node)
        for other in placed[1:]:
            self._join(placed[0], other)
        for source in sources:
            if self._axes[source] is not None:
                continue
            value = self.values[source]
            position = placed[0].dim - (out.ndim - value.ndim)
            if position < 0 or value.shape[position] == 1:
                if value.numel() > 1:
                    self._fix_attribute(source)
                continue
            if source.op != "get_attr" or str(source.target) not in self._tensors:
                return self._give_up(node)
            self._bind(node, str(source.target), position, placed[0])
        return placed[0]
