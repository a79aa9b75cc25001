"""What each layer and each function does to the channels that enter it."""

from __future__ import annotations

from collections.abc import Set
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

Kind = Literal["linear", "depthwise", "norm", "elementwise", "spatial", "reshape", "reduction", "transpose", "binary"]

_ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.ELU, nn.CELU, nn.SELU, nn.Tanh, nn.Sigmoid, nn.Mish,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign, nn.Identity,
    nn.modules.dropout._DropoutNd,
)  # fmt: skip
_ELEMENTWISE = """
    abs celu clamp clone contiguous detach dropout dropout1d dropout2d dropout3d elu exp float gelu hardsigmoid
    hardswish hardtanh leaky_relu leaky_relu_ mish neg pow relu relu6 relu_ selu sigmoid sigmoid_ silu softplus
    softsign sqrt square tanh tanh_ tanhshrink
"""
_ELEMENTWISE_FUNCTIONS = frozenset(_ELEMENTWISE.split())
_SPATIAL_MODULES = (
    nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd, nn.Upsample,
)  # fmt: skip
_SPATIAL_FUNCTIONS = frozenset(
    f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for d in (1, 2, 3)
) | {"interpolate"}
_RESHAPES = frozenset({"flatten", "reshape", "squeeze", "unflatten", "unsqueeze", "view"})
_BINARY = frozenset(
    {"add", "add_", "div", "iadd", "imul", "isub", "maximum", "minimum", "mul", "mul_", "sub", "sub_", "truediv"}
)
_KNOWN_TENSORS = frozenset({"weight", "bias", "running_mean", "running_var", "num_batches_tracked"})
_REDUCTIONS = frozenset({"amax", "amin", "mean", "sum"})
_CALLS: dict[str, Kind] = {
    **dict.fromkeys(_BINARY, "binary"),
    **dict.fromkeys(_ELEMENTWISE_FUNCTIONS, "elementwise"),
    **dict.fromkeys(_SPATIAL_FUNCTIONS, "spatial"),
    **dict.fromkeys(_RESHAPES, "reshape"),
    **dict.fromkeys(_REDUCTIONS, "reduction"),
    "transpose": "transpose",
    "permute": "transpose",
}


def kind_of_call(node: fx.Node) -> Kind | None:
    """What a function or a tensor's method does to channels; ``None`` where nothing is known.

    Args:
        node: calls it.
    """
    return _CALLS.get(function_name(node))


def kind_of_layer(layer: nn.Module, tensors: Set[str]) -> Kind | None:
    """What a layer does to channels; ``None`` where nothing is known.

    Args:
        layer: of any class.
        tensors: names in its state dict.
    """
    # A layer that computes in its own way, or from weights of its own, is one of which nothing is known.
    if not type(layer).__module__.startswith("torch.nn.") or not tensors <= _KNOWN_TENSORS:
        return None
    if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
        return _kind_of_linear(layer) if "weight" in tensors else None
    if isinstance(layer, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.PReLU)):
        return "norm"
    if isinstance(layer, _ELEMENTWISE_MODULES):
        return "elementwise"
    if isinstance(layer, _SPATIAL_MODULES):
        return "spatial"
    return "reshape" if isinstance(layer, (nn.Flatten, nn.Unflatten)) else None


def _kind_of_linear(layer: nn.Linear | nn.modules.conv._ConvNd) -> Kind | None:
    if isinstance(layer, nn.Linear) or layer.groups == 1:
        return "linear"
    is_transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    return "depthwise" if layer.groups == layer.in_channels and not is_transposed else None


def function_name(node: fx.Node) -> str:
    """The name of the function or method that a node calls.

    Args:
        node: calls it.
    """
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def has_tensors(value: Any) -> bool:
    """Whether a value is a tensor or holds some.

    Args:
        value: of a node.
    """
    return any(isinstance(leaf, Tensor) for leaf in torch.utils._pytree.tree_leaves(value))
