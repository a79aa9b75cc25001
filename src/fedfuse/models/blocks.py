"""Cut any model into blocks in sequence and a linear head."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from fedfuse.core.artifact import ModelSpec, Recipe, build
from fedfuse.core.errors import ModelError
from fedfuse.core.registry import register_recipe
from fedfuse.core.seeding import Rng
from fedfuse.models.tracing import run, submodule, trace

Balance = Literal["parameters", "compute"]

# What follows a layer and has no weights worth a block of its own stays with it: a cut goes after these, not before.
_TRAILING_MODULES = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.GELU,
    nn.SiLU,
    nn.ELU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Hardswish,
    nn.modules.dropout._DropoutNd,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Flatten,
    nn.Identity,
)
_TRAILING_FUNCTIONS = {
    "relu", "relu_", "gelu", "silu", "leaky_relu", "tanh", "sigmoid", "elu", "max_pool2d", "avg_pool2d",
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "flatten", "dropout", "mean", "view", "reshape", "squeeze",
    "transpose", "permute",
}  # fmt: skip


@dataclass(frozen=True)
class Pieces:
    """A model in pieces; running the blocks one after another and then the head is the model.

    Args:
        blocks: in sequence; the state dict of each is a slice of the model's own, names unchanged.
        head: the model's last linear layer.
        head_name: its name in the model.
        recipes: what rebuilds each block.
        points: names of the graph's nodes after which it was cut.
        shapes: shape of each block's output, without the batch.
    """

    blocks: list[nn.Module]
    head: nn.Linear
    head_name: str
    recipes: list[dict[str, Any]]
    points: tuple[str, ...]
    shapes: list[tuple[int, ...]]

    @property
    def interfaces(self) -> list[tuple[int, int]]:
        """Channels, and dimensions with the batch, of each block's output; tokens ``(t, d)`` have theirs last."""
        return [(shape[1] if len(shape) == 2 else shape[0], len(shape) + 1) for shape in self.shapes]

    def copy(self) -> Pieces:
        """Pieces of one's own, to train or to load weights into."""
        return copy.deepcopy(self)

    def load_whole(self, state: Mapping[str, Tensor]) -> None:
        """Load the whole model's state dict into the pieces.

        Args:
            state: name in the model to tensor.

        Raises:
            ModelError: a tensor is missing.
        """
        try:
            for block in self.blocks:
                block.load_state_dict({name: state[name] for name in block.state_dict()})
            self.head.load_state_dict({name: state[f"{self.head_name}.{name}"] for name in self.head.state_dict()})
        except KeyError as error:
            raise ModelError(f"the weights lack {error}", fix="use weights of the same architecture") from None


def cut(
    module: nn.Module,
    num_blocks: int,
    example: Tensor,
    *,
    balance: Balance = "parameters",
    points: Sequence[str] | None = None,
    recipe: Recipe | None = None,
) -> Pieces:
    """Cut a model where a single tensor crosses, into blocks as equal as the places allow, and its linear head.

    Args:
        module: any module that torch.fx can trace, or an ``nn.Sequential``; it must end in an ``nn.Linear``. It is
            copied, not changed.
        num_blocks: number of blocks before the head, at least 1.
        example: an input, shape ``(n, *input_shape)``.
        balance: make blocks equal in ``parameters`` or in ``compute`` (multiplications for the example).
        points: names of ``num_blocks - 1`` layers after which to cut, instead of balancing.
        recipe: what rebuilds the whole model; recipes of blocks refer to it.

    Returns:
        The pieces.

    Raises:
        ModelError: the model cannot be traced, ends in no linear layer, or cannot be cut so finely.
    """
    graph = _Cuttable(copy.deepcopy(module), example)
    if points is None:
        ends = graph.balanced(num_blocks, balance)
    else:
        if len(points) != num_blocks - 1:
            raise ModelError(
                f"{len(points)} points make {len(points) + 1} blocks, not {num_blocks}",
                where="points",
                fix=f"give {num_blocks - 1} points",
            )
        ends = graph.at(points)
    return graph.pieces(ends, recipe)


def cut_spec(
    spec: ModelSpec, num_blocks: int, *, balance: Balance = "parameters", points: Sequence[str] | None = None
) -> Pieces:
    """Cut the model of a specification; the pieces have its first weights.

    Args:
        spec: the model.
        num_blocks: number of blocks before the head.
        balance: what blocks are equal in.
        points: names of layers after which to cut, instead of balancing.

    Returns:
        Pieces that others look at too: :meth:`Pieces.copy` them before anything is changed.
    """
    return _cut_spec(_Key(spec), num_blocks, balance, None if points is None else tuple(points))


class _Key:
    """A specification as a key: equal content is the same key."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec, self._digest = spec, spec.digest

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)


@lru_cache(maxsize=32)
def _cut_spec(key: _Key, num_blocks: int, balance: Balance, points: tuple[str, ...] | None) -> Pieces:
    spec = key.spec
    recipe = None if spec.template is not None else spec.recipe
    return cut(spec.build(), num_blocks, spec.example_input(), balance=balance, points=points, recipe=recipe)


@register_recipe("block")
def build_block(recipe: Mapping[str, Any]) -> nn.Module:
    """Build one block of a model.

    Args:
        recipe: ``of`` (the model's recipe), ``input_shape``, ``points`` and ``index``.

    Returns:
        The block with fresh weights.
    """
    facts = json.dumps([recipe["of"], recipe["input_shape"], recipe["points"]], sort_keys=True)
    block: nn.Module = copy.deepcopy(_rebuilt(facts)[recipe["index"]])
    return block


@lru_cache(maxsize=32)
def _rebuilt(facts: str) -> list[nn.Module]:
    of, input_shape, points = json.loads(facts)
    # Under a generator of its own: what others draw must not depend on what is remembered here.
    with Rng(0).ambient("fresh weights"):
        whole = build(of)
    return cut(whole, len(points) + 1, torch.zeros(2, *input_shape), points=points, recipe=of).blocks


class _Cuttable:
    """A traced model: its nodes, what each costs, and where it can be cut."""

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        self.module, self.graph = module, trace(module)
        self.nodes = [node for node in self.graph.nodes if node.op != "output"]
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.values = run(module, self.graph, example)
        output = next(node for node in self.graph.nodes if node.op == "output")
        last = output.args[0]
        layer = submodule(self.module, last) if isinstance(last, fx.Node) else None
        if not isinstance(last, fx.Node) or not isinstance(layer, nn.Linear) or len(self.values[last].shape) != 2:
            what = type(layer).__name__ if layer is not None else getattr(last, "name", "several values")
            raise ModelError(
                f"the model ends in {what}, not in a linear layer",
                fix="give a classifier whose last step is an nn.Linear on a feature vector",
            )
        source = last.args[0]
        assert isinstance(source, fx.Node)
        if source.op == "placeholder":
            raise ModelError(
                "the model is a single linear layer and has no block",
                fix="use a model with at least one layer before its head",
            )
        self.head, self.head_name, self.features = layer, str(last.target), source
        self.nodes = self.nodes[: self.position[source] + 1]
        self.input = next(node for node in self.nodes if node.op == "placeholder")

    def places(self) -> list[int]:
        """Positions after which one tensor, and nothing else, crosses."""
        last_use = {
            node: max((self.position[user] for user in node.users if user in self.position), default=-1)
            for node in self.nodes
        }
        found = []
        for i, node in enumerate(self.nodes[:-1]):
            crossing = [n for n in self.nodes[: i + 1] if last_use[n] > i and n.op != "get_attr"]
            if node.op != "placeholder" and crossing == [node] and isinstance(self.values[node], Tensor):
                found.append(i)
        return found

    def good_places(self) -> list[int]:
        """Those of :meth:`places` that part no layer from the normalisation, activation or pooling behind it."""
        return [i for i in self.places() if not all(self._is_trailing(user) for user in self.nodes[i].users)]

    def _is_trailing(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(submodule(self.module, node), _TRAILING_MODULES)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        return node.op in ("call_function", "call_method") and name in _TRAILING_FUNCTIONS

    def cost(self, node: fx.Node, balance: Balance) -> int:
        module = submodule(self.module, node)
        if balance == "parameters":
            own = self.module.get_parameter(str(node.target)).numel() if self._is_parameter(node) else 0
            return own + (sum(p.numel() for p in module.parameters()) if module else 0)
        if module is None or not isinstance(self.values[node], Tensor):
            return 0
        # Every weight of a convolution is used at each position of the output, of a linear layer once per row.
        weights = sum(p.numel() for p in module.parameters() if p.ndim > 1)
        out = self.values[node]
        num_uses: int = out[0, 0].numel() if out.ndim == 4 else out[0, ..., 0].numel()
        return weights * num_uses

    def _is_parameter(self, node: fx.Node) -> bool:
        return node.op == "get_attr" and str(node.target) in dict(self.module.named_parameters())

    def balanced(self, num_blocks: int, balance: Balance) -> list[int]:
        """Ends of blocks such that the largest is as small as can be."""
        if num_blocks < 1:
            raise ModelError(f"{num_blocks} blocks", where="num_blocks", fix="give at least 1")
        parameters = self._sums("parameters")
        costs = self._sums(balance)
        for places in (self.good_places(), self.places()):
            # A block without weights would be nothing to train.
            ends = [i for i in places if parameters[i + 1] > 0 and parameters[-1] > parameters[i + 1]]
            chosen = _best_ends(ends, len(self.nodes) - 1, num_blocks, costs, parameters)
            if chosen is not None:
                return chosen
        distinct = len({parameters[i + 1] for i in self.places()} - {0, parameters[-1]}) + 1
        raise ModelError(
            f"the model cannot be cut into {num_blocks} blocks, at most into {distinct}",
            where="num_blocks",
            fix=f"use num_blocks: {distinct} or less, or a deeper model",
        )

    def _sums(self, balance: Balance) -> list[int]:
        sums = [0]
        for node in self.nodes:
            sums.append(sums[-1] + self.cost(node, balance))
        return sums

    def at(self, points: Sequence[str]) -> list[int]:
        """Ends of blocks at named layers or nodes."""
        ends, places = [], self.places()
        for point in points:
            # A node's own name comes first: the recipes of blocks hold such names, and a layer may be used many times.
            inside = [i for i, node in enumerate(self.nodes) if point == node.name] or [
                i
                for i, node in enumerate(self.nodes)
                if point == str(node.target) or point in node.meta.get("nn_module_stack", {})
            ]
            if not inside:
                names = [name for name, _ in self.module.named_children()]
                raise ModelError(
                    f'there is no layer "{point}"', where="points", fix=f"layers are: {', '.join(names)}, ..."
                )
            if inside[-1] not in places:
                raise ModelError(
                    f'the model cannot be cut after "{point}": more than one tensor crosses there',
                    where="points",
                    fix="cut outside of residual connections",
                )
            ends.append(inside[-1])
        if any(a >= b for a, b in pairwise(ends)):
            raise ModelError(
                "the points are not in the order of the model",
                where="points",
                fix="name them from the input to the output",
            )
        return [*ends, len(self.nodes) - 1]

    def pieces(self, ends: Sequence[int], recipe: Recipe | None) -> Pieces:
        blocks = [self._block(start, end) for start, end in pairwise([0, *(end + 1 for end in ends)])]
        self._check_apart(blocks)
        points = tuple(self.nodes[end].name for end in ends[:-1])
        shape = list(self.values[self.input].shape[1:])
        recipes: list[dict[str, Any]] = [
            {"kind": "opaque"}
            if recipe is None
            else {"kind": "block", "of": recipe, "input_shape": shape, "points": list(points), "index": k}
            for k in range(len(blocks))
        ]
        outputs = [self.values[self.nodes[end]] for end in ends]
        shapes = [tuple(out.shape[1:]) for out in outputs]
        assert isinstance(self.head, nn.Linear)
        return Pieces(
            [copy.deepcopy(block) for block in blocks],
            copy.deepcopy(self.head),
            self.head_name,
            recipes,
            points,
            shapes,
        )

    def _block(self, start: int, end: int) -> fx.GraphModule:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        entrance = self.input if start == 0 else self.nodes[start - 1]
        copies[entrance] = graph.placeholder("x")
        for node in self.nodes[start:end]:
            if node.op == "placeholder":
                continue
            for needed in node.all_input_nodes:
                # Parameters that are read by name are read again where they are needed.
                if needed not in copies and needed.op == "get_attr":
                    copies[needed] = graph.node_copy(needed, lambda n: copies[n])
            copies[node] = graph.node_copy(node, lambda n: copies[n])
        graph.output(copies[self.nodes[end - 1]])
        return fx.GraphModule(self.module, graph)

    def _check_apart(self, blocks: Sequence[nn.Module]) -> None:
        """No weight may be in two pieces: they are trained apart."""
        head = [(f"{self.head_name}.{name}", tensor) for name, tensor in self.head.named_parameters()]
        owner: dict[int, tuple[int, str]] = {}
        parts: list[list[tuple[str, Tensor]]] = [[*b.named_parameters(), *b.named_buffers()] for b in blocks]
        parts.append([*head])
        for k, tensors in enumerate(parts):
            for name, tensor in tensors:
                if owner.setdefault(id(tensor), (k, name))[0] != k:
                    raise ModelError(
                        f'the weight "{name}" is used in two blocks',
                        where="points",
                        fix="give points that keep its uses together, or fewer blocks",
                    )


def _best_ends(
    places: Sequence[int], last: int, num_blocks: int, costs: Sequence[int], parameters: Sequence[int]
) -> list[int] | None:
    """Choose ends of blocks so that the largest cost is least; later ties go to the deeper cut."""
    best: dict[int, tuple[int, list[int]]] = {-1: (0, [])}
    for number in range(num_blocks):
        found: dict[int, tuple[int, list[int]]] = {}
        for end in [last] if number == num_blocks - 1 else places:
            for start, (worst, ends) in best.items():
                if start < end and parameters[end + 1] > parameters[start + 1]:
                    candidate = max(worst, costs[end + 1] - costs[start + 1])
                    if end not in found or candidate < found[end][0]:
                        found[end] = (candidate, [*ends, end])
        best = found
    return best[last][1] if last in best else None
