"""From a module to the graph of what it computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedfuse.core.errors import ModelError
from fedfuse.models.foundation.foundation import Foundation

_FIX = "write it as an nn.Sequential of its blocks, or without control flow that depends on the input"


class _Tracer(fx.Tracer):
    """Traces the first argument of a forward; the others keep their defaults.

    Args:
        leaves: modules to take as they are, without looking inside.
    """

    # What is computed from a buffer is part of the graph, not a constant of the moment.
    proxy_buffer_attributes = True

    def __init__(self, leaves: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self._leaves = {id(leaf) for leaf in leaves}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self._leaves or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        # Arguments with a default, such as a mask, would otherwise become inputs that nobody gives.
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]


def trace(module: nn.Module) -> fx.Graph:
    """Trace a module of one input; parts that cannot be traced are taken as they are.

    Args:
        module: left as it is, except that constants which its forward makes become attributes of it.

    Returns:
        The graph; its only placeholder is the input.

    Raises:
        ModelError: the module's own forward cannot be traced, or does different things in training and evaluation
            that are no layers.
    """
    if any(isinstance(part, Foundation) for part in module.modules()):
        raise ModelError(
            "a foundation model is not cut into blocks, and its channels are not matched",
            where="method.name",
            fix="use a method for adapters, such as fedit, flora or afl",
        )
    in_other_mode = copy.deepcopy(module).train(not module.training)
    try:
        graph = _Tracer().trace(module)
    except Exception:
        graph = _trace_around(module)
    _check_modes(in_other_mode, graph)
    return graph


def _trace_around(module: nn.Module) -> fx.Graph:
    leaves: list[nn.Module] = []
    # Children stand behind their parents, so in reverse the smallest parts that fail are found first.
    for part in reversed([m for m in module.modules() if m is not module]):
        if not _is_traceable(part, leaves):
            leaves.append(part)
    try:
        return _Tracer(leaves).trace(module)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise ModelError(f"the model cannot be traced: {type(error).__name__}: {first}", fix=_FIX) from None


def _is_traceable(part: nn.Module, leaves: Iterable[nn.Module]) -> bool:
    if fx.Tracer().is_leaf_module(part, "") or isinstance(part, (nn.ModuleList, nn.ModuleDict)):
        return True
    try:
        _Tracer(leaves).trace(part)
    except Exception:
        return False
    return True


def _check_modes(in_other_mode: nn.Module, graph: fx.Graph) -> None:
    """A functional dropout is traced with the mode of the moment and would stay on, or off, for ever."""
    # The same parts are taken as they are, so that only what the mode changes differs.
    leaves = [in_other_mode.get_submodule(str(n.target)) for n in graph.nodes if n.op == "call_module"]
    try:
        other = _Tracer(leaves).trace(in_other_mode)
    except Exception:
        return
    names = [n.name for n in other.nodes]
    first = next((n for n, m in zip(graph.nodes, other.nodes, strict=False) if _facts(n) != _facts(m)), None)
    if first is not None or len(names) != len(graph.nodes):
        what = f'"{first.name}"' if first is not None else "its forward"
        raise ModelError(
            f"the model behaves differently in training and in evaluation at {what}, which cannot be traced",
            fix="use layers such as nn.Dropout instead of functions that are told the mode",
        )


def _facts(node: fx.Node) -> tuple[str, str, str]:
    return node.op, str(node.target), f"{node.args} {node.kwargs}"


def run(module: nn.Module, graph: fx.Graph, example: Tensor) -> dict[fx.Node, Any]:
    """Run a graph in evaluation mode and keep every value.

    Args:
        module: what was traced; its mode and buffers are as before when this returns.
        graph: its graph.
        example: an input, shape ``(n, *input_shape)``.

    Returns:
        Node to its value.

    Raises:
        ModelError: the model cannot take the example.
    """
    values: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            Recorder(module, graph=graph).run(example)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise ModelError(
            f"the model cannot take an input of shape {tuple(example.shape[1:])}: {first}",
            fix="check the shape of the data and the first layer of the model",
        ) from None
    finally:
        for part, mode in modes:
            part.training = mode
    return values


def submodule(module: nn.Module, node: fx.Node) -> nn.Module | None:
    """The layer that a node calls; ``None`` where it calls none.

    Args:
        module: what was traced.
        node: of its graph.
    """
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None
