"""Where the mixtures of a model stand: behind its blocks, at equal relative depths in every model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse.core.artifact import ModelSpec, Recipe, build
from fedfuse.core.errors import ConfigError, ModelError
from fedfuse.core.judging import HasObjective
from fedfuse.core.registry import register_recipe
from fedfuse.core.seeding import Rng
from fedfuse.models.blocks import cut
from fedfuse.models.foundation.dema import (
    DenseMixture,
    MixtureShape,
    Place,
    Tuned,
    TunedFoundation,
    TunedGenerator,
    TunedPieces,
    TunedWriter,
)
from fedfuse.models.foundation.foundation import Foundation
from fedfuse.models.fused import channel_dim


@dataclass(frozen=True)
class Plan:
    """Where the mixtures of one model stand.

    Args:
        spec: the model.
        shape: what all clients agree on.
    """

    spec: ModelSpec
    shape: MixtureShape

    @cached_property
    def places(self) -> list[Place]:
        """Blocks behind which there is a mixture, spread evenly over the depth; the last block is one.

        Raises:
            ConfigError: the model has fewer blocks.
        """
        num = self.shape.num_positions
        module = self.spec.build()
        if isinstance(module, Foundation):
            names = layers_of(module)
            if len(names) < num:
                raise ConfigError(
                    f"a model with {len(names)} layers has no {num} places for mixtures",
                    where="method.num_positions",
                    fix=f"give {len(names)} or less",
                )
            chosen = [names[position] for position in spread(len(names), num)]
            return _with_widths(module, chosen, self.spec.example_input())
        try:
            pieces = cut(module, num, self.spec.example_input())
        except ModelError as error:
            fix = "give fewer, or use another model"
            raise ConfigError(error.what, where="method.num_positions", fix=fix) from None
        channels = [channels for channels, _ in pieces.interfaces]
        # The last block ends before the head, and no name is needed for that.
        return [Place(name, width) for name, width in zip([*pieces.points, ""], channels, strict=True)]

    @property
    def recipe(self) -> dict[str, Any]:
        """What rebuilds the model with its mixtures."""
        return {
            "kind": "dema",
            "of": self.spec.recipe,
            "input_shape": list(self.spec.input_shape),
            "places": [[place.name, place.channels] for place in self.places],
            "num_experts": self.shape.num_experts,
            "rank": self.shape.rank,
            "seed": self.shape.seed,
        }

    def build(self) -> Tuned:
        """The model with its first weights, and mixtures with theirs; every call gives a new one with equal weights."""
        with Rng(self.spec.seed).ambient("mixtures"):
            module = self.spec.build()
            return _tuned(module, self.places, self.shape, self.spec.input_shape, self.recipe)


def _tuned(
    module: nn.Module,
    places: Sequence[Place],
    shape: MixtureShape,
    input_shape: Sequence[int],
    recipe: Recipe,
) -> Tuned:
    first = shape.first_shared()
    mixtures = [
        DenseMixture(place.channels, [first[f"mixtures.{position}.experts.{k}"] for k in range(shape.num_experts)])
        for position, place in enumerate(places)
    ]
    if isinstance(module, Foundation):
        has_objective = isinstance(module, HasObjective)
        kind = TunedGenerator if hasattr(module, "generate") else TunedWriter if has_objective else TunedFoundation
        return kind(module, mixtures, places, recipe)
    points = [place.name for place in places[:-1]]
    pieces = cut(module, len(places), torch.zeros(2, *input_shape), points=points)
    return TunedPieces(pieces, mixtures, recipe)


@register_recipe("dema")
def build_dema(recipe: Mapping[str, Any]) -> Tuned:
    """Build a model with mixtures.

    Args:
        recipe: what :attr:`Plan.recipe` gave.

    Returns:
        The model with fresh weights.
    """
    places = [Place(str(name), int(channels)) for name, channels in recipe["places"]]
    shape = MixtureShape(len(places), int(recipe["num_experts"]), int(recipe["rank"]), int(recipe["seed"]))
    return _tuned(build(recipe["of"]), places, shape, recipe["input_shape"], recipe)


def layers_of(module: nn.Module) -> list[str]:
    """Names of the layers that a transformer consists of, in order.

    They are the list of modules of one class that holds the most parameters.

    Args:
        module: any.

    Raises:
        ModelError: there is no such list.
    """
    best: tuple[int, list[str]] = (0, [])
    for name, part in module.named_modules():
        if isinstance(part, nn.ModuleList) and len({type(layer) for layer in part}) == 1:
            size = sum(parameter.numel() for parameter in part.parameters())
            if size > best[0]:
                best = (size, [f"{name}.{k}" for k in range(len(part))])
    if not best[1]:
        raise ModelError(
            "the model has no list of layers of one kind",
            where=type(module).__name__,
            fix="use a transformer, or another method",
        )
    return best[1]


def spread(num_blocks: int, num_positions: int) -> list[int]:
    """Blocks at equal relative depths; the last is one.

    Args:
        num_blocks: of a model.
        num_positions: how many are chosen.

    Returns:
        Positions from 0, ascending.

    Example:
        >>> spread(6, 2), spread(4, 2), spread(5, 3)
        ([2, 5], [1, 3], [1, 3, 4])
    """
    return [-(-(k + 1) * num_blocks // num_positions) - 1 for k in range(num_positions)]


def _with_widths(module: nn.Module, names: Sequence[str], example: Tensor) -> list[Place]:
    """The width of what comes out of each layer."""
    seen: dict[str, int] = {}

    def look(name: str) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            seen[name] = hidden.shape[channel_dim(hidden.ndim)]

        return hook

    handles = [module.get_submodule(name).register_forward_hook(look(name)) for name in names]
    with torch.inference_mode():
        module.eval()(example)
    for handle in handles:
        handle.remove()
    return [Place(name, seen[name]) for name in names]
