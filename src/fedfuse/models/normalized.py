"""A model behind the normalisation of its inputs, so that what is shipped takes what the data source gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse.core.artifact import Artifact, Recipe, build, detached_state
from fedfuse.core.registry import register_recipe


class Normalized(nn.Module):
    """Subtracts a mean, divides by a standard deviation, and runs a model.

    Args:
        inner: the model.
        mean: per channel or feature.
        std: per channel or feature, above 0.
        input_ndim: dimensions of one input; 3 for images ``(c, h, w)``.
        recipe: what rebuilds the inner model.
    """

    def __init__(
        self, inner: nn.Module, *, mean: Sequence[float], std: Sequence[float], input_ndim: int, recipe: Recipe
    ) -> None:
        super().__init__()
        self.inner, self.inner_recipe, self.input_ndim = inner, recipe, input_ndim
        shape = [len(mean), *([1] * (input_ndim - 1))]
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).reshape(shape))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).reshape(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and run.

        Args:
            x: inputs as the source gives them, shape ``(n, *input_shape)``.

        Returns:
            The inner model's output.
        """
        answer: Tensor = self.inner((x - self.mean) / self.std)
        return answer

    @property
    def recipe(self) -> dict[str, Any]:
        """What rebuilds it."""
        return {
            "kind": "normalized",
            "inner": self.inner_recipe,
            "num_channels": self.mean.numel(),
            "input_ndim": self.input_ndim,
        }


@register_recipe("normalized")
def build_normalized(recipe: Mapping[str, Any]) -> Normalized:
    """Build a normalised model; mean and deviation come with the weights.

    Args:
        recipe: what :attr:`Normalized.recipe` gave.

    Returns:
        The module with fresh weights.
    """
    count = int(recipe["num_channels"])
    return Normalized(
        build(recipe["inner"]),
        mean=[0.0] * count,
        std=[1.0] * count,
        input_ndim=int(recipe["input_ndim"]),
        recipe=recipe["inner"],
    )


def normalized_artifact(artifact: Artifact, mean: Sequence[float], std: Sequence[float], input_ndim: int) -> Artifact:
    """Put an artifact behind a normalisation.

    Args:
        artifact: takes normalised inputs.
        mean: per channel or feature.
        std: per channel or feature.
        input_ndim: dimensions of one input.

    Returns:
        An artifact that takes inputs as the source gives them.
    """
    module = Normalized(artifact.module(), mean=mean, std=std, input_ndim=input_ndim, recipe=artifact.recipe)
    template = None if artifact.template is None else module
    return Artifact(recipe=module.recipe, state=detached_state(module), template=template, info=artifact.info)
