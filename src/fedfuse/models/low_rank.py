"""Any model with its inner layers as products of two thin ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse.core.artifact import ModelSpec, build
from fedfuse.core.errors import ModelError
from fedfuse.core.registry import register_recipe
from fedfuse.core.seeding import Rng
from fedfuse.ops.lora import truncated_matrix

Ranks = Mapping[str, int]
"""Name of a layer to the rank of its product."""

_STEPS = 64


@dataclass(frozen=True)
class Layer:
    """A linear layer or a convolution as a matrix.

    A convolution's matrix has one row per output channel and horizontal place, and one column per input channel and
    vertical place: its factors are a vertical and a horizontal convolution.

    Args:
        shape: of the weight.
        has_bias: whether there is one.
    """

    shape: tuple[int, ...]
    has_bias: bool

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns."""
        if len(self.shape) == 2:
            return self.shape[0], self.shape[1]
        d_out, d_in, height, width = self.shape
        return d_out * width, d_in * height

    def saving(self, rank: int) -> int:
        """Numbers that two thin layers hold less than this one.

        Args:
            rank: of their product.
        """
        rows, columns = self.matrix_shape
        return rows * columns - rank * (rows + columns)

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as a matrix.

        Args:
            weight: of :attr:`shape`.
        """
        return weight if weight.ndim == 2 else weight.permute(0, 3, 1, 2).reshape(self.matrix_shape)

    def factors(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The weights of the two thin layers whose product is nearest.

        Args:
            weight: of :attr:`shape`.
            rank: of the product.

        Returns:
            Of the first layer and of the second, with the weight's dtype.
        """
        found = truncated_matrix(self.matrix(weight).double(), rank, Rng(0).torch("thin layers"))
        first, second = found.right, found.left
        if len(self.shape) == 4:
            d_out, d_in, height, width = self.shape
            first = first.reshape(rank, d_in, height, 1)
            second = second.reshape(d_out, width, rank).permute(0, 2, 1)[:, :, None]
        return first.to(weight.dtype).contiguous(), second.to(weight.dtype).contiguous()

    def product(self, first: Tensor, second: Tensor) -> Tensor:
        """The weight of one layer that does what the two do.

        Args:
            first: weight of the first layer.
            second: weight of the second.

        Returns:
            Of :attr:`shape`.
        """
        if len(self.shape) == 2:
            return second @ first
        # (o, r, 1, b) and (r, i, a, 1) to (o, i, a, b).
        return torch.einsum("orb,ria->oiab", second[:, :, 0], first[..., 0])


def layers_of(module: nn.Module) -> dict[str, Layer]:
    """The layers that can be made thin: all linear layers and plain convolutions but the first and the last.

    Args:
        module: any.

    Returns:
        Name to layer, in the module's order; those whose weight is not trained are left out.

    Raises:
        ModelError: the model trains a low-rank change of its weights, not the weights.
    """
    named = dict(module.named_modules())
    if any(hasattr(part, "lora_A") for part in named.values()):
        raise ModelError(
            "this model trains low-rank changes of its weights, not the weights",
            where="model.peft",
            fix="use kind: full, or a method for adapters",
        )
    found = {
        name: part
        for name, part in named.items()
        if type(part) is nn.Linear
        or (type(part) is nn.Conv2d and part.groups == 1 and part.padding_mode == "zeros" and _is_plain(part))
    }
    return {
        name: Layer(tuple(part.weight.shape), part.bias is not None)
        for name, part in list(found.items())[1:-1]
        if part.weight.requires_grad
    }


def _is_plain(layer: nn.Conv2d) -> bool:
    return not isinstance(layer.padding, str)


def largest_ranks(spec: ModelSpec, max_values: int) -> dict[str, int]:
    """The highest ranks with which a model holds no more numbers than it may.

    All layers get the same fraction of their full rank, in steps of 1/64, at least 1.

    Args:
        spec: the model.
        max_values: most numbers in all parameters; with the model's own number or more, no layer is made thin.

    Returns:
        Layer to rank; where even rank 1 is too large, rank 1.

    Raises:
        ModelError: no layer can be made thin, and the model as it is holds too many.
    """
    module = spec.build()
    whole = sum(parameter.numel() for parameter in module.parameters())
    if whole <= max_values:
        return {}
    layers = layers_of(module)
    if not layers:
        raise ModelError(
            "the model has no layer between its first and its last that could be made thin",
            where="model",
            fix="use a deeper model, or another method",
        )
    ranks: dict[str, int] = {}
    for step in range(_STEPS, 0, -1):
        ranks = {name: max(1, min(layer.matrix_shape) * step // _STEPS) for name, layer in layers.items()}
        saved = {name: layers[name].saving(rank) for name, rank in ranks.items()}
        # A product that holds more than its layer would be no gain.
        ranks = {name: rank for name, rank in ranks.items() if saved[name] > 0}
        if whole - sum(saved[name] for name in ranks) <= max_values:
            break
    return ranks


def thinned(module: nn.Module, ranks: Ranks) -> nn.Module:
    """Put two thin layers in the place of each named one, with fresh weights.

    Args:
        module: changed in place.
        ranks: layer to rank.

    Returns:
        The module.
    """
    for name, rank in ranks.items():
        parent_name, _, child = name.rpartition(".")
        parent, layer = module.get_submodule(parent_name), module.get_submodule(name)
        setattr(parent, child, _pair(layer, rank))
    return module


def _pair(layer: nn.Module, rank: int) -> nn.Sequential:
    has_bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return nn.Sequential(
            nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=has_bias)
        )
    assert isinstance(layer, nn.Conv2d)
    return nn.Sequential(
        nn.Conv2d(layer.in_channels, rank, bias=False, **_along(layer, 0)),
        nn.Conv2d(rank, layer.out_channels, bias=has_bias, **_along(layer, 1)),
    )


def _along(layer: nn.Conv2d, axis: int) -> dict[str, Any]:
    """A convolution's settings along one axis, and nothing happening along the other."""
    nothing = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}
    return {
        name: tuple(getattr(layer, name)[k] if k == axis else idle for k in range(2)) for name, idle in nothing.items()
    }


@dataclass(frozen=True)
class Thin:
    """A model and a thin form of it: turns weights of the one into weights of the other.

    Args:
        spec: the whole model.
        ranks: layer to rank.
        layers: the thin layers as they are in the whole model.
    """

    spec: ModelSpec
    ranks: Ranks
    layers: Mapping[str, Layer]

    @classmethod
    def of(cls, spec: ModelSpec, max_values: int) -> Thin:
        """The thin form that holds no more numbers than it may.

        Args:
            spec: the whole model.
            max_values: most numbers in all parameters.
        """
        ranks = largest_ranks(spec, max_values)
        layers = layers_of(spec.build()) if ranks else {}
        return cls(spec, ranks, {name: layers[name] for name in ranks})

    @property
    def thin_spec(self) -> ModelSpec:
        """The thin model; the whole one where no layer is thin."""
        if not self.ranks:
            return self.spec
        recipe = {"kind": "low_rank", "of": self.spec.recipe, "ranks": dict(self.ranks)}
        return ModelSpec(recipe, self.spec.seed, self.spec.input_shape, self.spec.num_classes)

    def factorised(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The nearest weights of the thin model (Eckart and Young, 1936).

        Args:
            state: of the whole model.
        """
        found = {}
        for name, tensor in state.items():
            layer_name, _, kind = name.rpartition(".")
            if layer_name not in self.ranks:
                found[name] = tensor
            elif kind == "bias":
                found[f"{layer_name}.1.bias"] = tensor
            else:
                first, second = self.layers[layer_name].factors(tensor, self.ranks[layer_name])
                found |= {f"{layer_name}.0.weight": first, f"{layer_name}.1.weight": second}
        return found

    def composed(self, name: str, thin: Mapping[str, Tensor]) -> Tensor:
        """A tensor of the whole model that does what the thin one does.

        Args:
            name: in the whole model's state.
            thin: the thin model's state; only what is needed is read from it.

        Returns:
            In float64 where two factors are multiplied.
        """
        layer_name, _, kind = name.rpartition(".")
        if layer_name not in self.ranks:
            return thin[name]
        if kind == "bias":
            return thin[f"{layer_name}.1.bias"]
        first, second = thin[f"{layer_name}.0.weight"], thin[f"{layer_name}.1.weight"]
        return self.layers[layer_name].product(first.double(), second.double())


@register_recipe("low_rank")
def build_low_rank(recipe: Mapping[str, Any]) -> nn.Module:
    """Build a model with thin layers.

    Args:
        recipe: ``of``, the whole model's recipe, and ``ranks``, layer to rank.

    Returns:
        The model with fresh weights.
    """
    return thinned(build(recipe["of"]), {str(name): int(rank) for name, rank in recipe["ranks"].items()})


def product_energy(module: nn.Module, ranks: Ranks) -> Tensor:
    """Sum of the squares of the weights that the thin layers' products have.

    Args:
        module: a thin model.
        ranks: layer to rank.

    Returns:
        A scalar through which gradients pass.
    """
    total = torch.zeros((), device=next(module.parameters()).device)
    for name in ranks:
        first, second = (module.get_submodule(f"{name}.{k}").weight for k in range(2))
        assert isinstance(first, Tensor) and isinstance(second, Tensor)
        # (o, r, 1, b) and (r, i, a, 1): rows of one and columns of the other meet in r.
        right, left = first.flatten(1), second.transpose(0, 1).flatten(1)
        total = total + ((left @ left.T) * (right @ right.T)).sum()
    return total
