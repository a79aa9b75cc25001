"""A user's own module as a recipe, so that its artifact loads without the user's code."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedfuse.core.artifact import ModelSpec, Recipe, detached_state, load_state
from fedfuse.core.errors import ArtifactError, FedfuseError, ModelError
from fedfuse.core.registry import RECIPES, register_recipe
from fedfuse.core.seeding import Rng
from fedfuse.models.graph_net import build_graph, lookup
from fedfuse.models.layers import (
    METHODS,
    describe_layer,
    dtype_name,
    function_name,
)
from fedfuse.models.tracing import trace

_MAX_CONSTANT = 4096


class _Indescribable(Exception):
    """Something in a module has no place in a recipe."""


def describe(module: nn.Module, example: Tensor) -> Recipe | None:
    """Describe a module so that it can be rebuilt without its code.

    The description is tried out: it must rebuild to the same names, shapes and dtypes, and to the same numbers in
    training and evaluation mode.

    Args:
        module: any; left as it is.
        example: inputs that it accepts, shape ``(n, *input_shape)``, at least 2.

    Returns:
        The recipe; ``None`` where the module cannot be traced or uses what recipes cannot name.
    """
    copied = copy.deepcopy(module).cpu()
    try:
        # Rebuilding draws weights; nobody's generator may move for it.
        with Rng(0).ambient("describe"):
            recipe: Recipe = json.loads(json.dumps(_describe(copied, example), allow_nan=False))
            return recipe if _is_same(copied, recipe, example) else None
    except (FedfuseError, _Indescribable, RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError):
        return None


def _describe(module: nn.Module, example: Tensor) -> dict[str, Any]:
    # Hooks are code.
    if any(m._forward_hooks or m._forward_pre_hooks for m in module.modules()):
        raise _Indescribable
    layers: list[list[Any]] = []
    tensors: list[list[Any]] = []
    _walk(module, "", layers, tensors, {})
    graph = trace(module)
    known = {path for path, _ in layers}
    if not {str(n.target) for n in graph.nodes if n.op == "call_module"} <= known:
        raise _Indescribable
    named = {path for path, _ in tensors}
    for node in graph.nodes:
        target = str(node.target)
        # What belongs to a layer is found there; what is no parameter and no buffer is a constant.
        if node.op == "get_attr" and target not in named and target.rpartition(".")[0] not in known:
            tensors.append([target, _tensor(lookup(module, target), "constant")])
            named.add(target)
    return {
        "kind": "graph",
        "layers": layers,
        "tensors": tensors,
        "ties": _ties(module),
        "frozen": [name for name, parameter in module.named_parameters() if not parameter.requires_grad],
        "steps": [_step(node) for node in graph.nodes],
    }


def _ties(module: nn.Module) -> list[list[str]]:
    """Parameters that are another one; those of a layer used under two names are not among them."""
    first: dict[int, str] = {}
    ties = []
    for path, part in module.named_modules():
        for name, parameter in part._parameters.items():
            full = f"{path}.{name}" if path else name
            if parameter is not None and first.setdefault(id(parameter), full) != full:
                ties.append([full, first[id(parameter)]])
    return ties


def _walk(
    module: nn.Module, path: str, layers: list[list[Any]], tensors: list[list[Any]], seen: dict[int, str]
) -> None:
    if seen.setdefault(id(module), path) != path:
        layers.append([path, {"same_as": seen[id(module)]}])
        return
    facts = describe_layer(module)
    if facts is not None and path:
        layers.append([path, facts])
        return
    prefix = f"{path}." if path else ""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            tensors.append([prefix + name, _tensor(parameter, "parameter")])
    for name, buffer in module._buffers.items():
        if buffer is not None:
            role = "constant" if name in module._non_persistent_buffers_set else "buffer"
            tensors.append([prefix + name, _tensor(buffer, role)])
    for name, child in module._modules.items():
        if child is not None:
            _walk(child, prefix + name, layers, tensors, seen)


def _tensor(value: Tensor, role: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"role": role, "shape": list(value.shape), "dtype": dtype_name(value.dtype)}
    if role == "constant":
        if value.numel() > _MAX_CONSTANT:
            raise _Indescribable
        facts["values"] = [_number(v) for v in value.detach().flatten().tolist()]
    return facts


def _number(value: Any) -> Any:
    return {"float": repr(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _step(node: fx.Node) -> dict[str, Any]:
    op = {
        "placeholder": "input",
        "output": "output",
        "call_module": "layer",
        "get_attr": "tensor",
        "call_function": "function",
        "call_method": "method",
    }[node.op]
    step: dict[str, Any] = {"op": op, "name": node.name}
    if op in ("layer", "tensor", "method"):
        step["target"] = str(node.target)
    if op == "function":
        step["target"] = function_name(node.target)
    if (op == "method" and node.target not in METHODS) or (op == "function" and step["target"] is None):
        raise _Indescribable
    if node.args and op != "input":
        step["args"] = [_encode(arg) for arg in node.args]
    if node.kwargs:
        step["kwargs"] = {key: _encode(value) for key, value in node.kwargs.items()}
    return step


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.Size):
        return {"tuple": list(value)}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v) for v in value]}
    if isinstance(value, list):
        return [_encode(v) for v in value]
    if isinstance(value, slice):
        return {"slice": [_encode(v) for v in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    raise _Indescribable


def _is_same(module: nn.Module, recipe: Recipe, example: Tensor) -> bool:
    """Whether the recipe rebuilds to the same weights by name and the same numbers, for two sizes of the batch."""
    rebuilt = build_graph(recipe)
    state, other = module.state_dict(), rebuilt.state_dict()
    if {k: (v.shape, v.dtype) for k, v in state.items()} != {k: (v.shape, v.dtype) for k, v in other.items()}:
        return False
    load_state(rebuilt, state)
    for training in (False, True):
        for inputs in (example, torch.cat([example, example[:1]])):
            answers = []
            for candidate in (module, rebuilt):
                with torch.no_grad(), Rng(0).ambient("describe"):
                    answers.append(copy.deepcopy(candidate).train(training)(inputs.clone()))
            if not all(isinstance(a, Tensor) for a in answers) or not torch.equal(*answers):
                return False
    return True


@register_recipe("opaque")
def build_opaque(recipe: Mapping[str, Any]) -> nn.Module:
    """Refuse to build a module that no recipe can describe.

    Args:
        recipe: may have the ``name`` of the module's class.

    Raises:
        ArtifactError: always; it says how the artifact is loaded.
    """
    name = recipe.get("name")
    raise ArtifactError(
        f"the model{f' ({name})' if name else ''} could not be described by a recipe, so its code is needed to load it",
        fix="give a module of the same architecture: fedfuse.load(path, model=...)",
    )


def user_spec(
    module_or_factory: nn.Module | Callable[[], nn.Module], *, input_shape: tuple[int, ...], num_classes: int, seed: int
) -> ModelSpec:
    """The specification of a user's own model.

    Args:
        module_or_factory: a module, whose weights everyone starts from, or a class or function without arguments
            that makes one; its weights are drawn from ``seed``.
        input_shape: shape of one input.
        num_classes: number of outputs.
        seed: see above.

    Returns:
        A specification with a recipe of kind ``graph``; where the module cannot be described, one of kind ``opaque``
        that carries the module itself.

    Raises:
        ModelError: there is no module, or it does not map the inputs to ``num_classes`` logits.
    """
    input_shape = tuple(input_shape)
    with Rng(seed).ambient("initial weights"):
        module = _module(module_or_factory)
        example = torch.randn((3, *input_shape), generator=Rng(seed).torch("example input"))
        _check_output(module, example, num_classes)
    # A foundation model carries the recipe of its base.
    own = getattr(module, "recipe", None)
    has_own = isinstance(own, Mapping) and own.get("kind") in RECIPES.names()
    recipe = own if has_own else describe(module, example)
    return ModelSpec(
        recipe={"kind": "opaque", "name": type(module).__name__} if recipe is None else recipe,
        seed=seed,
        input_shape=input_shape,
        num_classes=num_classes,
        initial=detached_state(module),
        template=module if recipe is None else None,
    )


def _module(module_or_factory: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    if isinstance(module_or_factory, nn.Module):
        return copy.deepcopy(module_or_factory).cpu()
    fix = "give a torch.nn.Module, or a class or function without arguments that makes one"
    if not callable(module_or_factory):
        raise ModelError(f"the model is a {type(module_or_factory).__name__}", where="model", fix=fix)
    try:
        module = module_or_factory()
    except TypeError as error:
        raise ModelError(f"the model cannot be made: {error}", where="model", fix=fix) from None
    if not isinstance(module, nn.Module):
        raise ModelError(f"the model's function gave a {type(module).__name__}", where="model", fix=fix)
    return module.cpu()


def _check_output(module: nn.Module, example: Tensor, num_classes: int) -> None:
    modes = [(part, part.training) for part in module.modules()]
    try:
        # This also gives lazy layers their sizes.
        with torch.no_grad():
            output = module.eval()(example)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise ModelError(
            f"the model cannot take an input of shape {tuple(example.shape[1:])}: {first}",
            where="model",
            fix="check the shape of the data and the first layer of the model",
        ) from None
    finally:
        for part, mode in modes:
            part.training = mode
    if not isinstance(output, Tensor) or output.shape != (len(example), num_classes):
        given = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ModelError(
            f"the model gives {given} for {len(example)} inputs, wanted {(len(example), num_classes)}",
            where="model",
            fix=f"end the model in nn.Linear(..., {num_classes}), one logit per class",
        )
