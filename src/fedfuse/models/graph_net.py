"""Running what a graph recipe describes, without making code of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedfuse.core.errors import ArtifactError, ModelError
from fedfuse.core.registry import register_recipe
from fedfuse.models.layers import FUNCTIONS, METHODS, build_layer, dtype_of

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\Z")
_CHANGED = "use an artifact that fedfuse wrote"
_ATOMS = {("float", "inf"): math.inf, ("float", "-inf"): -math.inf, ("float", "nan"): math.nan, ("ellipsis", True): ...}


class GraphNet(nn.Module):
    """Runs the steps of a recipe one after another; no code is made of them.

    Args:
        steps: what a recipe of kind ``graph`` holds under that name.

    Raises:
        ArtifactError: a step asks for what recipes may not use.
    """

    def __init__(self, steps: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        known: set[str] = set()
        for step in steps:
            _check(step, known)
            known.add(step["name"])
        self._steps = list(steps)

    def forward(self, x: Tensor) -> Any:
        """Run all steps.

        Args:
            x: the input.

        Returns:
            What the described module returns.

        Raises:
            ArtifactError: a method of tensors is called on something else.
        """
        values: dict[str, Any] = {}
        for step in self._steps:
            op, target = step["op"], step.get("target", "")
            args = _decode(step.get("args", []), values)
            kwargs = {key: _decode(given, values) for key, given in step.get("kwargs", {}).items()}
            if op == "output":
                return args[0]
            if op == "input":
                value: Any = x
            elif op == "layer":
                value = self.get_submodule(target)(*args, **kwargs)
            elif op == "tensor":
                value = lookup(self, target)
            elif op == "function":
                value = FUNCTIONS[target](*args, **kwargs)
            else:
                if not isinstance(args[0], (Tensor, fx.Proxy)):
                    raise ArtifactError(f'the recipe calls "{target}" on no tensor', fix=_CHANGED)
                value = getattr(args[0], target)(*args[1:], **kwargs)
            values[step["name"]] = value
        raise ArtifactError("the recipe has no output", fix=_CHANGED)


def _check(step: Mapping[str, Any], known: set[str]) -> None:
    op, target, name = step["op"], step.get("target", ""), step["name"]
    is_allowed = isinstance(target, str) and isinstance(name, str) and _NAME.match(name) is not None
    if op in ("layer", "tensor"):
        is_allowed = is_allowed and _PATH.match(target) is not None
    elif op == "function":
        is_allowed = is_allowed and target in FUNCTIONS
    elif op == "method":
        is_allowed = is_allowed and target in METHODS
    elif op not in ("input", "output"):
        is_allowed = False
    if not is_allowed:
        raise ArtifactError(f"the recipe asks for {op!r:.20} {target!r:.60}, which recipes may not use", fix=_CHANGED)
    for value in (*step.get("args", []), *step.get("kwargs", {}).values()):
        _check_value(value, known)


def _check_value(value: Any, known: set[str]) -> None:
    if isinstance(value, list):
        for part in value:
            _check_value(part, known)
        return
    if value is None or isinstance(value, (bool, int, float, str)):
        return
    (tag, inner), *others = value.items() if isinstance(value, dict) and value else [("", None)]
    if not others and tag in ("tuple", "slice") and isinstance(inner, list):
        _check_value(inner, known)
    elif not others and tag == "node" and isinstance(inner, str) and inner in known:
        return
    elif not others and tag == "dtype" and isinstance(inner, str):
        dtype_of(inner)
    elif others or isinstance(inner, (list, dict)) or (tag, inner) not in _ATOMS:
        raise ArtifactError(f"the recipe holds {value!s:.60}, which is no value", fix=_CHANGED)


@register_recipe("graph")
def build_graph(recipe: Mapping[str, Any]) -> nn.Module:
    """Build a module from the description of its graph.

    Args:
        recipe: ``layers``, ``tensors``, ``ties``, ``frozen`` and ``steps``, as :func:`describe` gave them.

    Returns:
        The module with fresh weights; what was frozen or shared is so again.
    """
    module = GraphNet(recipe["steps"])
    for path, facts in recipe["layers"]:
        layer = module.get_submodule(facts["same_as"]) if "same_as" in facts else build_layer(facts)
        _home(module, path).add_module(path.rsplit(".", 1)[-1], layer)
    for path, facts in recipe["tensors"]:
        home, name = _home(module, path), path.rsplit(".", 1)[-1]
        dtype, values = dtype_of(facts["dtype"]), facts.get("values")
        tensor = torch.zeros(facts["shape"], dtype=dtype)
        if values is not None:
            tensor = torch.tensor([_finite(v) for v in values], dtype=dtype).reshape(facts["shape"])
        if facts["role"] == "parameter":
            home.register_parameter(name, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
        else:
            home.register_buffer(name, tensor, persistent=facts["role"] == "buffer")
    for path, same_as in recipe["ties"]:
        _home(module, path).register_parameter(path.rsplit(".", 1)[-1], module.get_parameter(same_as))
    for path in recipe["frozen"]:
        module.get_parameter(path).requires_grad_(False)
    return module


def _home(module: nn.Module, path: str) -> nn.Module:
    """The container that a path stands in, made if it is not there."""
    if not isinstance(path, str) or not _PATH.match(path):
        raise ArtifactError(f"the recipe has the name {path!r:.60}", fix=_CHANGED)
    for part in path.split(".")[:-1]:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    return module


def lookup(module: nn.Module, path: str) -> Tensor:
    """The parameter, buffer or constant of that name.

    Args:
        module: where.
        path: its full name.

    Raises:
        ModelError: there is no such tensor.
    """
    home, _, name = path.rpartition(".")
    value = getattr(module.get_submodule(home), name)
    if not isinstance(value, Tensor):
        raise ModelError(f'"{path}" is no tensor')
    return value


def _finite(value: Any) -> Any:
    return _ATOMS["float", value["float"]] if isinstance(value, dict) else value


def _decode(value: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_decode(v, values) for v in value]
    if not isinstance(value, dict):
        return value
    ((tag, inner),) = value.items()
    if tag == "node":
        return values[inner]
    if tag == "tuple":
        return tuple(_decode(v, values) for v in inner)
    if tag == "slice":
        return slice(*(_decode(v, values) for v in inner))
    return dtype_of(inner) if tag == "dtype" else _ATOMS[tag, inner]
