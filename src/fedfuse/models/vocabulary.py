"""The words of graph recipes: which layers, functions and tensor methods one may name, and how values are written.

A recipe may come from anybody. So names are looked up in the tables of this file and nowhere else: none is imported,
none is searched for on an object, and what is not in a table does not exist.
"""

from __future__ import annotations

import base64
import inspect
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.core.errors import ModelError

_LAYER_NAMES = """
Identity Linear Bilinear Flatten Unflatten Embedding EmbeddingBag Fold Unfold CosineSimilarity PairwiseDistance
Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d
BatchNorm1d BatchNorm2d BatchNorm3d InstanceNorm1d InstanceNorm2d InstanceNorm3d GroupNorm LayerNorm RMSNorm
LocalResponseNorm
ReLU ReLU6 LeakyReLU PReLU RReLU ELU CELU SELU GELU GLU SiLU Mish Tanh Sigmoid Hardswish Hardsigmoid Hardtanh
Hardshrink Softplus Softshrink Softsign Softmax Softmax2d Softmin LogSoftmax LogSigmoid Tanhshrink Threshold
MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d LPPool1d LPPool2d AdaptiveAvgPool1d AdaptiveAvgPool2d
AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d
Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout
PixelShuffle PixelUnshuffle ChannelShuffle Upsample UpsamplingNearest2d UpsamplingBilinear2d
ZeroPad1d ZeroPad2d ZeroPad3d ConstantPad1d ConstantPad2d ConstantPad3d ReflectionPad1d ReflectionPad2d
ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d CircularPad1d CircularPad2d CircularPad3d
RNN LSTM GRU RNNCell LSTMCell GRUCell MultiheadAttention
TransformerEncoderLayer TransformerDecoderLayer TransformerEncoder
"""
LAYERS: Mapping[str, type[nn.Module]] = {name: getattr(nn, name) for name in _LAYER_NAMES.split()}
"""Layers that a recipe may name."""

_OPERATORS = """
add sub mul truediv floordiv mod pow matmul neg pos eq ne lt le gt ge and_ or_ xor invert getitem
iadd isub imul itruediv
"""
_TORCH = """
abs add addmm adaptive_avg_pool1d amax amin argmax argmin baddbmm bmm broadcast_tensors bucketize cat chunk clamp
column_stack concat concatenate conv1d conv2d conv3d cos cosh cross cumsum diff div einsum eq erf exp expm1 eye flatten
flip floor fmod ge gt gather hstack index_select isfinite isnan le lerp log log10 log1p log2 log_softmax logical_and
logical_not logical_or logsumexp lt masked_fill matmul max maximum mean median min minimum movedim moveaxis mul
multiply narrow ne neg negative norm numel ones_like outer permute polar pow prod reciprocal relu relu_ remainder
repeat_interleave reshape roll rot90 round rsqrt selu sigmoid sign sin sinh softmax split sqrt square squeeze stack std
sub subtract sum swapaxes swapdims t tan tanh tensordot tile topk transpose tril triu true_divide trunc unbind
unflatten unsqueeze var var_mean std_mean vstack where zeros_like full_like rsub avg_pool1d max_pool1d max_pool2d
max_pool3d layer_norm group_norm batch_norm celu prelu fft.fft fft.ifft fft.fft2 fft.ifft2 fft.rfft fft.irfft
fft.rfft2 fft.irfft2 linalg.norm linalg.vector_norm linalg.matrix_norm
"""
_FUNCTIONAL = """
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d bilinear celu conv1d conv2d conv3d conv_transpose1d
conv_transpose2d conv_transpose3d cosine_similarity elu elu_ embedding fold gelu glu grid_sample affine_grid group_norm
hardshrink hardsigmoid hardswish hardtanh instance_norm interpolate layer_norm leaky_relu leaky_relu_ linear
local_response_norm log_softmax logsigmoid lp_pool1d lp_pool2d max_pool1d max_pool2d max_pool3d mish normalize one_hot
pad pairwise_distance pixel_shuffle pixel_unshuffle prelu relu relu_ relu6 rms_norm scaled_dot_product_attention selu
sigmoid silu softmax softmin softplus softshrink softsign tanh tanhshrink threshold unfold upsample
"""
METHODS = frozenset(
    """
abs abs_ add add_ addmm all amax amin any argmax argmin argsort baddbmm bmm bool byte chunk clamp clamp_ clone
contiguous cos cumsum detach diff dim div div_ double eq erf exp expand expand_as expm1 flatten flip float floor ge
gather gt half bfloat16 index_select int is_floating_point isfinite isnan le log log1p log_softmax logical_and
logical_not logical_or logsumexp long lt masked_fill masked_fill_ matmul max maximum mean median min minimum mm movedim
moveaxis mul mul_ mv narrow ndimension ne neg nelement norm numel permute pow prod reciprocal relu relu_ remainder
repeat repeat_interleave reshape reshape_as roll round rsqrt select sigmoid sigmoid_ sign sin size softmax sort split
sqrt square squeeze std sub sub_ sum swapaxes swapdims t tan tanh tanh_ tile to topk transpose tril triu trunc type_as
unbind unflatten unfold unsqueeze var view view_as where
""".split()
)
"""Methods of tensors that a recipe may call."""

ATTRIBUTES = frozenset("shape ndim dtype device T mT H real imag".split())
"""Attributes of tensors that a recipe may read."""


def _named(prefix: str, home: Any, names: str) -> dict[str, Callable[..., Any]]:
    return {f"{prefix}.{name}": operator.attrgetter(name)(home) for name in names.split()}


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **_named("operator", operator, _OPERATORS),
    **_named("torch", torch, _TORCH),
    **_named("functional", F, _FUNCTIONAL),
    "getattr": getattr,
    "len": len,
}
"""Functions that a recipe may call; ``getattr`` only for :data:`ATTRIBUTES`."""

_NAMES = {id(function): name for name, function in reversed(FUNCTIONS.items())}

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128, torch.bool,
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    )
}  # fmt: skip
_MEMORY_FORMATS = {
    str(form).removeprefix("torch."): form
    for form in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d, torch.preserve_format)
}
_MAX_DEPTH = 16
_MAX_CONSTANT_BYTES = 2**20
# No setting of a layer is a larger number; those that count copies are bounded more tightly.
_MAX_SETTING = 2**40
_MAX_COPIES = 1024


class Indescribable(Exception):
    """Something has no word here; its text says what."""


@dataclass(frozen=True)
class Ref:
    """The result of an earlier step, in the arguments of a later one.

    Args:
        step: number of the earlier step.
    """

    step: int


def function_name(function: Any) -> str:
    """The word for a function.

    Args:
        function: any function.

    Raises:
        Indescribable: it has none.
    """
    if id(function) not in _NAMES:
        raise Indescribable(f"the function {getattr(function, '__name__', type(function).__name__)}")
    return _NAMES[id(function)]


def write_dtype(dtype: torch.dtype) -> str:
    """The word for a type of numbers.

    Args:
        dtype: any.

    Raises:
        Indescribable: it has none.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise Indescribable(f"tensors of type {name}")
    return name


def read_dtype(name: Any) -> torch.dtype:
    """The type of numbers of a word.

    Args:
        name: what :func:`write_dtype` gave.

    Raises:
        ModelError: there is none of that name.
    """
    return _lookup("type of numbers", name, _DTYPES)


def _lookup(what: str, name: Any, table: Mapping[str, Any]) -> Any:
    if not isinstance(name, str) or name not in table:
        raise ModelError(f'a graph recipe cannot name the {what} "{name!s:.60}"', fix="do not load it: it was changed")
    return table[name]


def read_layer(name: Any) -> type[nn.Module]:
    """The class of a layer.

    Args:
        name: as in ``torch.nn``.

    Raises:
        ModelError: recipes may not name it.
    """
    found: type[nn.Module] = _lookup("layer", name, LAYERS)
    return found


def read_function(name: Any) -> str:
    """Check that a function may be called.

    Args:
        name: a key of :data:`FUNCTIONS`.

    Raises:
        ModelError: recipes may not name it.
    """
    _lookup("function", name, FUNCTIONS)
    return str(name)


def read_method(name: Any) -> str:
    """Check that a method of tensors may be called.

    Args:
        name: one of :data:`METHODS`.

    Raises:
        ModelError: recipes may not name it.
    """
    return str(_lookup("tensor method", name, dict.fromkeys(METHODS, name)))


def read_attribute(name: Any) -> str:
    """Check that an attribute of tensors may be read.

    Args:
        name: one of :data:`ATTRIBUTES`.

    Raises:
        ModelError: recipes may not name it.
    """
    return str(_lookup("tensor attribute", name, dict.fromkeys(ATTRIBUTES, name)))


def write_value(value: Any) -> Any:
    """Write an argument or a setting as JSON.

    Args:
        value: plain Python or torch values, and :class:`Ref`.

    Raises:
        Indescribable: it is of another kind.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Ref):
        return {"step": value.step}
    if isinstance(value, list):
        return [write_value(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [write_value(item) for item in value]}
    if isinstance(value, slice):
        return {"slice": [write_value(item) for item in (value.start, value.stop, value.step)]}
    if isinstance(value, dict):
        return {"dict": [[write_value(key), write_value(item)] for key, item in value.items()]}
    if isinstance(value, torch.dtype):
        return {"dtype": write_dtype(value)}
    if value is Ellipsis:
        return {"ellipsis": True}
    for name, form in _MEMORY_FORMATS.items():
        if value is form:
            return {"memory_format": name}
    raise Indescribable(f"an argument of type {type(value).__name__}")


def read_value(value: Any, num_steps: int = 0, depth: int = 0) -> Any:
    """Read what :func:`write_value` wrote.

    Args:
        value: JSON.
        num_steps: number of steps before this one; only those can be referred to.
        depth: how deep in other values it is.

    Raises:
        ModelError: it is malformed.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if depth > _MAX_DEPTH:
        raise ModelError(f"a value in a graph recipe is nested more than {_MAX_DEPTH} deep")

    def inner(items: Any) -> list[Any]:
        return [read_value(item, num_steps, depth + 1) for item in items]

    if isinstance(value, list):
        return inner(value)
    if isinstance(value, Mapping) and len(value) == 1:
        [(kind, content)] = value.items()
        if kind == "step" and type(content) is int and 0 <= content < num_steps:
            return Ref(content)
        if kind == "tuple" and isinstance(content, list):
            return tuple(inner(content))
        if kind == "slice" and isinstance(content, list) and len(content) == 3:
            return slice(*inner(content))
        if kind == "dict" and isinstance(content, list):
            return {read_value(key): read_value(item, num_steps, depth + 1) for key, item in content}
        if kind == "float" and content in ("inf", "-inf", "nan"):
            return float(content)
        if kind == "dtype":
            return read_dtype(content)
        if kind == "memory_format":
            return _lookup("memory format", content, _MEMORY_FORMATS)
        if kind == "ellipsis":
            return Ellipsis
    raise ModelError(f"a graph recipe holds a value that it cannot hold: {value!s:.60}")


def write_constant(tensor: Tensor) -> str:
    """Write a small tensor that is no weight.

    Args:
        tensor: at most 1 MiB.

    Returns:
        Base64 of its bytes.

    Raises:
        Indescribable: it is too large.
    """
    tensor = tensor.detach().cpu().contiguous()
    if tensor.numel() * tensor.element_size() > _MAX_CONSTANT_BYTES:
        raise Indescribable("a constant of more than 1 MiB that is no persistent buffer")
    return base64.b64encode(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).decode()


def read_constant(text: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Read what :func:`write_constant` wrote.

    Args:
        text: base64.
        shape: the tensor's.
        dtype: the tensor's.

    Returns:
        A tensor of its own on the CPU, whatever the default device is.
    """
    content = bytearray(base64.b64decode(text, validate=True))
    if not content:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(content, dtype=torch.uint8).view(dtype).reshape(shape).clone()


def write_layer(module: nn.Module) -> dict[str, Any]:
    """Describe one layer by its class and the settings that it was made with.

    Args:
        module: a layer of ``torch.nn``.

    Returns:
        ``{"layer": CLASS, "settings": {...}}``.

    Raises:
        Indescribable: its class has no word, or a setting cannot be read back.
    """
    kind = type(module)
    if LAYERS.get(kind.__name__) is not kind:
        raise Indescribable(f"the layer {kind.__name__}")
    try:
        found = _settings(module)
    except (AttributeError, IndexError, TypeError) as error:
        raise Indescribable(f"the settings of the layer {kind.__name__}") from error
    settings = {
        key: {"layer": write_layer(value)} if isinstance(value, nn.Module) else write_value(value)
        for key, value in found.items()
    }
    return {"layer": kind.__name__, "settings": settings}


def make_layer(name: Any, settings: Any, depth: int = 0) -> nn.Module:
    """Make the layer that :func:`write_layer` described.

    Args:
        name: its class.
        settings: what it was made with.
        depth: in how many other layers' settings it is.

    Returns:
        The layer with fresh weights on the default device.

    Raises:
        ModelError: the class has no word, or a setting is none of its or of no possible size.
    """
    kind = read_layer(name)
    if not isinstance(settings, Mapping) or depth > 2:
        raise ModelError(f"the settings of the layer {name} are broken")
    found = {}
    for key, value in settings.items():
        if key in ("device", "dtype") or key.startswith("_"):
            raise ModelError(f'a graph recipe cannot give the setting "{key}" to the layer {name}')
        if isinstance(value, Mapping) and set(value) == {"layer"}:
            found[key] = make_layer(value["layer"]["layer"], value["layer"]["settings"], depth + 1)
        else:
            found[key] = read_value(value)
            _check_size(name, key, found[key])
    try:
        return kind(**found)
    except (RuntimeError, TypeError, ValueError, AssertionError, OverflowError, MemoryError, ArithmeticError) as error:
        raise ModelError(f"the layer {name} cannot be made: {str(error).splitlines()[0]:.120}") from None


def _check_size(layer: str, key: str, value: Any) -> None:
    limit = _MAX_COPIES if key == "num_layers" else _MAX_SETTING
    for number in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(number, int) and abs(number) > limit:
            raise ModelError(f"the layer {layer} would have {key} {number}", fix=f"the largest is {limit}")


def _settings(module: Any) -> dict[str, Any]:
    if isinstance(module, nn.RNNBase):
        names = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"]
        names += {"RNN": ["nonlinearity"], "LSTM": ["proj_size"]}.get(type(module).__name__, [])
        return {name: getattr(module, name) for name in names}
    if isinstance(module, nn.MultiheadAttention):
        names = ["embed_dim", "num_heads", "dropout", "add_zero_attn", "kdim", "vdim", "batch_first"]
        found = {name: getattr(module, name) for name in names}
        return {**found, "bias": module.in_proj_bias is not None, "add_bias_kv": module.bias_k is not None}
    if isinstance(module, nn.TransformerEncoder):
        first = write_layer(module.layers[0])
        if any(write_layer(layer) != first for layer in module.layers):
            raise Indescribable("a TransformerEncoder of unequal layers")
        return {
            "encoder_layer": module.layers[0],
            "num_layers": module.num_layers,
            "norm": module.norm,
            "enable_nested_tensor": module.enable_nested_tensor,
        }
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        activation = {F.relu: "relu", F.gelu: "gelu"}.get(getattr(module, "activation", None))
        if activation is None:
            raise Indescribable(f"the activation of a {type(module).__name__}")
        attention = module.self_attn
        return {
            "d_model": attention.embed_dim, "nhead": attention.num_heads, "activation": activation,
            "dim_feedforward": module.linear1.out_features, "dropout": module.dropout.p,
            "layer_norm_eps": module.norm1.eps, "batch_first": attention.batch_first,
            "norm_first": module.norm_first, "bias": module.linear1.bias is not None,
        }  # fmt: skip
    found = {}
    for name, parameter in inspect.signature(type(module)).parameters.items():
        is_setting = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if name in ("device", "dtype") or name.startswith("_") or not is_setting:
            continue
        if hasattr(module, name):
            value = getattr(module, name)
            found[name] = value if name != "bias" or isinstance(value, bool) else value is not None
        elif parameter.default is parameter.empty:
            raise Indescribable(f"the settings of the layer {type(module).__name__}")
    return found
