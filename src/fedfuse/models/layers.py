"""Which layers and functions a recipe may name, and how a layer's settings are read back from it.

Recipes are read from files that others made. A name outside these lists is never resolved.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.core.errors import ArtifactError, ModelError

_LAYERS = """
    AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d
    AdaptiveMaxPool3d AlphaDropout AvgPool1d AvgPool2d AvgPool3d BatchNorm1d BatchNorm2d BatchNorm3d Bilinear
    CELU ChannelShuffle ConstantPad1d ConstantPad2d Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d
    ConvTranspose3d CosineSimilarity Dropout Dropout1d Dropout2d Dropout3d ELU Embedding FeatureAlphaDropout
    Flatten Fold GELU GLU GRU GroupNorm Hardshrink Hardsigmoid Hardswish Hardtanh Identity InstanceNorm1d
    InstanceNorm2d InstanceNorm3d LSTM LayerNorm LeakyReLU Linear LocalResponseNorm LogSigmoid LogSoftmax
    MaxPool1d MaxPool2d MaxPool3d Mish MultiheadAttention PReLU PixelShuffle PixelUnshuffle RMSNorm RNN RReLU
    ReLU ReLU6 ReflectionPad1d ReflectionPad2d ReplicationPad1d ReplicationPad2d SELU SiLU Sigmoid Softmax
    Softmax2d Softmin Softplus Softshrink Softsign Tanh Tanhshrink Threshold TransformerEncoderLayer Unflatten
    Unfold Upsample UpsamplingBilinear2d UpsamplingNearest2d ZeroPad1d ZeroPad2d
"""
LAYERS = frozenset(_LAYERS.split())

_TORCH = """
    abs add adaptive_avg_pool1d amax amin arange argmax argmin atan baddbmm bmm cat ceil celu celu_ chunk
    clamp clip concat concatenate conv1d conv2d conv3d cos cumsum cumprod diff div einsum erf exp expm1 eye
    fft flatten flip floor full_like gather hstack index_select layer_norm lerp log log1p log_softmax
    logsumexp masked_fill matmul max max_pool1d max_pool2d maximum mean min minimum mm movedim mul multiply
    narrow neg norm ones ones_like outer permute pow prelu prod reciprocal relu relu_ repeat_interleave
    reshape roll round rsqrt select selu sigmoid sign sin softmax split sqrt square squeeze stack std sub
    subtract sum swapaxes t tan tanh tensordot tile topk transpose tril triu unbind unflatten unsqueeze var
    vstack where zeros zeros_like
"""
_F = """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    avg_pool1d avg_pool2d avg_pool3d batch_norm bilinear celu conv1d conv2d conv3d conv_transpose1d
    conv_transpose2d cosine_similarity dropout dropout1d dropout2d dropout3d elu elu_ embedding gelu glu
    group_norm hardsigmoid hardswish hardtanh instance_norm interpolate layer_norm leaky_relu leaky_relu_
    linear local_response_norm log_softmax logsigmoid lp_pool2d max_pool1d max_pool2d max_pool3d mish
    normalize one_hot pad pixel_shuffle pixel_unshuffle prelu relu relu6 relu_ rms_norm
    scaled_dot_product_attention selu sigmoid silu softmax softmin softplus softsign tanh tanhshrink threshold
    unfold
"""
_OPERATORS = """
    add and_ eq floordiv ge getitem gt iadd imul inv invert isub itruediv le lt matmul mod mul ne neg not_ or_
    pos pow sub truediv xor
"""
_METHODS = """
    abs add add_ amax amin argmax argmin bfloat16 bmm bool chunk clamp clip contiguous cos cumsum detach diff dim div
    double exp expand expand_as flatten flip float gather half index_select int log log1p log_softmax
    logsumexp long masked_fill matmul max mean min mm movedim mul mul_ narrow neg new_ones new_zeros norm
    numel permute pow prod reciprocal relu relu_ repeat repeat_interleave reshape roll round rsqrt select
    sigmoid sign sin size softmax split sqrt square squeeze std sub sub_ sum swapaxes t tanh tile to topk
    transpose tril triu type_as unbind unflatten unfold unsqueeze var view view_as
"""
METHODS = frozenset(_METHODS.split())
_ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim", "T", "mT"})
_REFUSED = object()
_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def attribute(value: Any, name: str) -> Any:
    """Read one of the few attributes of a tensor that a forward may need.

    Args:
        value: a tensor.
        name: ``shape``, ``dtype``, ``device``, ``ndim``, ``T`` or ``mT``.

    Raises:
        ModelError: it is another name, or no tensor.
    """
    if name not in _ATTRIBUTES or not isinstance(value, (Tensor, torch.fx.Proxy)):
        raise ModelError(f'a recipe may not read the attribute "{name}"', fix="use an artifact that fedfuse wrote")
    return getattr(value, name)


def _named() -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {}
    for prefix, home, names in (("torch", torch, _TORCH), ("F", F, _F), ("operator", operator, _OPERATORS)):
        for name in names.split():
            function = getattr(home, name, None)
            if callable(function):  # a torch of another version may lack a few
                found[f"{prefix}.{name}"] = function
    found["getattr"] = attribute
    return found


FUNCTIONS: Mapping[str, Callable[..., Any]] = _named()
# The first of several names of one function stays.
_NAMES = {id(function): name for name, function in reversed(list(FUNCTIONS.items()))} | {id(getattr): "getattr"}


def function_name(function: Any) -> str | None:
    """The name of a function in a recipe; ``None`` where it may not stand in one.

    Args:
        function: what a graph calls.
    """
    return _NAMES.get(id(function))


def describe_layer(layer: nn.Module) -> dict[str, Any] | None:
    """Read the settings of a layer back from it.

    Args:
        layer: exactly of a class of ``torch.nn``.

    Returns:
        What :func:`build_layer` turns back; ``None`` where the layer cannot be described.
    """
    kind = type(layer)
    if kind.__name__ not in LAYERS or getattr(nn, kind.__name__, None) is not kind:
        return None
    special = _SPECIAL.get(kind.__name__)
    settings = special(layer) if special else _settings(layer)
    if any(value is _REFUSED for value in settings.values()):
        return None
    facts: dict[str, Any] = {"layer": kind.__name__, "settings": settings}
    dtypes = {t.dtype for t in layer.state_dict().values() if t.is_floating_point()}
    if len(dtypes) > 1:
        return None
    if dtypes and dtypes != {torch.float32}:
        facts["dtype"] = dtype_name(dtypes.pop())
    return facts


def build_layer(facts: Mapping[str, Any]) -> nn.Module:
    """Build a layer.

    Args:
        facts: what :func:`describe_layer` gave.

    Returns:
        The layer with fresh weights.

    Raises:
        ArtifactError: the layer is none of those that a recipe may name.
    """
    name = facts["layer"]
    if name not in LAYERS:
        raise ArtifactError(
            f"the recipe names {name!r:.60}, which is no layer of torch.nn that recipes may use",
            fix="use an artifact that fedfuse wrote",
        )
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in facts["settings"].items()}
    layer: nn.Module = getattr(nn, name)(**settings)
    return layer.to(dtype_of(facts["dtype"])) if "dtype" in facts else layer


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, such as ``float32``.

    Args:
        dtype: any.
    """
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The dtype of that name.

    Args:
        name: such as ``float32``.

    Raises:
        ArtifactError: there is none.
    """
    dtype = getattr(torch, name, None) if isinstance(name, str) and name.isalnum() else None
    if not isinstance(dtype, torch.dtype):
        raise ArtifactError(
            f"the recipe names {name!r:.60}, which is no dtype", fix="use an artifact that fedfuse wrote"
        )
    return dtype


def _settings(layer: nn.Module) -> dict[str, Any]:
    """Every argument of the constructor is an attribute of the same name; what equals its default is left out."""
    found: dict[str, Any] = {}
    for parameter in list(inspect.signature(type(layer).__init__).parameters.values())[1:]:
        name = parameter.name
        if (
            name in ("device", "dtype")
            or name[0] == "_"
            or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ):
            continue
        if name == "bias":
            # Without affine weights there is no bias to have.
            if getattr(layer, "affine", True) is False or getattr(layer, "elementwise_affine", True) is False:
                continue
            value: Any = getattr(layer, "bias", None)
            value = value if isinstance(value, bool) else value is not None
        else:
            value = _plain(getattr(layer, name, _REFUSED))
        if value is _REFUSED or value != parameter.default or type(value) is not type(parameter.default):
            found[name] = value
    return found


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)) and all(v is None or isinstance(v, (bool, int, float)) for v in value):
        return list(value)
    return _REFUSED


def _recurrent(layer: Any) -> dict[str, Any]:
    names = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"]
    extra = {"LSTM": ["proj_size"], "RNN": ["nonlinearity"]}.get(type(layer).__name__, [])
    return {name: _plain(getattr(layer, name)) for name in names + extra}


def _attention(layer: Any) -> dict[str, Any]:
    names = ["embed_dim", "num_heads", "dropout", "add_zero_attn", "kdim", "vdim", "batch_first"]
    flags = {"bias": layer.in_proj_bias is not None, "add_bias_kv": layer.bias_k is not None}
    return {name: _plain(getattr(layer, name)) for name in names} | flags


def _encoder_layer(layer: Any) -> dict[str, Any]:
    activation = {F.relu: "relu", F.gelu: "gelu"}.get(layer.activation, _REFUSED)
    return {
        "d_model": layer.self_attn.embed_dim,
        "nhead": layer.self_attn.num_heads,
        "dim_feedforward": layer.linear1.out_features,
        "dropout": layer.dropout.p,
        "activation": activation,
        "layer_norm_eps": layer.norm1.eps,
        "batch_first": layer.self_attn.batch_first,
        "norm_first": layer.norm_first,
        "bias": layer.linear1.bias is not None,
    }


_SPECIAL: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "RNN": _recurrent,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "MultiheadAttention": _attention,
    "TransformerEncoderLayer": _encoder_layer,
}
