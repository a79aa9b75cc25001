"""Models that hold parts of a larger one: narrower layers, or fewer of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.errors import ModelError
from fedfuse.models.vit import Attention
from fedfuse.ops.slices import Packs, is_part, part_of


@dataclass(frozen=True)
class Nest:
    """A model and what smaller ones hold of it.

    Args:
        spec: the largest model.
        shapes: name in its state to shape.
        packs: name to the axes along which several parts lie one after another.
    """

    spec: ModelSpec
    shapes: Mapping[str, tuple[int, ...]]
    packs: Mapping[str, Packs]

    @classmethod
    def of(cls, spec: ModelSpec) -> Nest:
        """The nest of a model.

        Args:
            spec: the model.
        """
        module = spec.build()
        return cls(spec, shapes_of(module), packed_axes(module))

    def misfit(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """The first tensor of a model that is no part of this one.

        Args:
            shapes: name to shape in that model's state.

        Returns:
            Its name with both shapes; empty if all are parts.
        """
        for name, shape in shapes.items():
            whole = self.shapes.get(name)
            if whole is None:
                return f'"{name}", which the largest lacks'
            if not is_part(shape, whole, self.packs.get(name)):
                return f'"{name}" of shape {shape}, in the largest {whole}'
        return ""

    def part(self, state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """What a smaller model holds.

        Args:
            state: of the largest model.
            shapes: name to shape in the smaller model's state.
        """
        return {name: part_of(state[name], shape, self.packs.get(name)) for name, shape in shapes.items()}


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name to shape of everything in a module's state.

    Args:
        module: any.
    """
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def packed_axes(module: nn.Module) -> dict[str, Packs]:
    """Weights in which queries, keys and values lie one after another, so that a narrower model has a part of each.

    Args:
        module: any.

    Returns:
        Name in the state to axis and number of packs.
    """
    found: dict[str, Packs] = {}
    for name, part in module.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(part, Attention):
            found |= {f"{prefix}inner.weight": {0: 3}, f"{prefix}inner.bias": {0: 3}}
        elif isinstance(part, nn.MultiheadAttention):
            found |= {f"{prefix}in_proj_weight": {0: 3}, f"{prefix}in_proj_bias": {0: 3}}
        elif type(part).__name__ == "Conv1D" and prefix.endswith("c_attn."):
            # GPT-2 keeps its weights as (d_in, d_out).
            found |= {f"{prefix}weight": {1: 3}, f"{prefix}bias": {0: 3}}
    return found


def nest_of(specs: list[ModelSpec]) -> Nest:
    """The largest of some models, if all others are parts of it.

    Args:
        specs: from the smallest to the largest.

    Raises:
        ModelError: one is no part of the largest.
    """
    nest = Nest.of(specs[-1])
    for spec in specs[:-1]:
        misfit = nest.misfit(shapes_of(spec.build()))
        if misfit:
            raise ModelError(
                f"a client's model is no part of the largest one: {misfit}",
                where="model.clients",
                fix="use one family and change its width or its depth only, or another method",
            )
    return nest
