"""Families of models by name: settings to specifications."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import nn

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.errors import ModelError
from fedfuse.core.registry import MODELS, register_recipe
from fedfuse.core.settings import from_json, to_json

Norm = Literal["batch", "group", "none"]


class Family(Protocol):
    """A frozen dataclass of settings that builds modules for a task."""

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Build a classifier.

        Args:
            input_shape: shape of one input.
            num_classes: number of outputs.
        """
        ...


@runtime_checkable
class Describing(Protocol):
    """A family whose models are not rebuilt from its settings but described by their operations."""

    def spec(self, input_shape: tuple[int, ...], num_classes: int, seed: int) -> ModelSpec:
        """The specification of a classifier.

        Args:
            input_shape: shape of one input.
            num_classes: number of outputs.
            seed: first weights are drawn from it.
        """
        ...


def family(name: str, settings: Mapping[str, Any]) -> Family:
    """The family of that name with these settings, checked.

    Args:
        name: registry key.
        settings: setting to value.

    Raises:
        ConfigError: a setting is unknown or cannot have that value.
    """
    built: Family = from_json(MODELS.get(name), settings, where="model")
    return built


def spec(
    name: str, settings: Mapping[str, Any], *, input_shape: tuple[int, ...], num_classes: int, seed: int
) -> ModelSpec:
    """The specification of a model of a family.

    Args:
        name: registry key.
        settings: setting to value; the rest has defaults.
        input_shape: shape of one input.
        num_classes: number of outputs.
        seed: first weights are drawn from it.
    """
    chosen = family(name, settings)
    if isinstance(chosen, Describing):
        return chosen.spec(tuple(input_shape), num_classes, seed)
    recipe = {
        "kind": "model",
        "family": name,
        "settings": to_json(chosen),
        "input_shape": list(input_shape),
        "num_classes": num_classes,
    }
    return ModelSpec(recipe=recipe, seed=seed, input_shape=tuple(input_shape), num_classes=num_classes)


@register_recipe("model")
def build_model(recipe: Mapping[str, Any]) -> nn.Module:
    """Build a model of a family.

    Args:
        recipe: ``family``, ``settings``, ``input_shape`` and ``num_classes``.

    Returns:
        The model with fresh weights.
    """
    built = family(recipe["family"], recipe["settings"])
    return built.build(tuple(recipe["input_shape"]), recipe["num_classes"])


def with_width(wide: ModelSpec, width: int) -> ModelSpec:
    """The same model with another width.

    Args:
        wide: a model of a family that has a width.
        width: at least 1.

    Raises:
        ModelError: the model has no width to change.
    """
    settings = wide.recipe.get("settings", {})
    if "width" not in settings or wide.initial:
        raise ModelError(
            "the width of this model cannot be changed",
            where="method.width",
            fix="use width: own, or a model family that has a width",
        )
    return dataclasses.replace(wide, recipe={**wide.recipe, "settings": {**settings, "width": width}})


@dataclass(frozen=True)
class Normalizer:
    """Makes the normalisation layers of a network.

    Args:
        kind: ``batch``, ``group`` or ``none``.
    """

    kind: Norm

    def __call__(self, num_channels: int) -> nn.Module:
        """A layer for maps of that many channels.

        Args:
            num_channels: channels.
        """
        if self.kind == "batch":
            return nn.BatchNorm2d(num_channels)
        if self.kind == "group":
            # The most groups up to 8 that divide the channels.
            return nn.GroupNorm(max(g for g in range(1, 9) if num_channels % g == 0), num_channels)
        return nn.Identity()
