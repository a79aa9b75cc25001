"""A frozen feature extractor under a classifier made in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.core.artifact import Recipe, build
from fedfuse.core.errors import ModelError
from fedfuse.core.registry import register_recipe


class DiagonalGaussians(nn.Module):
    """The log likelihood of one Gaussian per class with independent features, plus the log prior.

    The squares are taken around a common centre, so that they do not cancel in single precision.

    Args:
        num_features: width of the features.
        num_classes: number of outputs.
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.center: Tensor
        self.means: Tensor
        self.precisions: Tensor
        self.log_priors: Tensor
        self.register_buffer("center", torch.zeros(num_features))
        self.register_buffer("means", torch.zeros(num_classes, num_features))
        self.register_buffer("precisions", torch.ones(num_classes, num_features))
        self.register_buffer("log_priors", torch.zeros(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Score.

        Args:
            x: features, shape ``(n, num_features)``.

        Returns:
            Joint log likelihoods up to a constant, shape ``(n, num_classes)``.
        """
        z, means = x - self.center, self.means - self.center
        squares = F.linear(z * z, self.precisions) - 2 * F.linear(z, self.precisions * means)
        offsets = (self.precisions * means * means).sum(1) - self.precisions.log().sum(1)
        return self.log_priors - 0.5 * (squares + offsets)


HEADS = {"linear": nn.Linear, "diagonal_gaussians": DiagonalGaussians}


class Headed(nn.Module):
    """Features and a head on them.

    Args:
        features: maps inputs to vectors.
        head: maps these to logits.
        recipe: what rebuilds the features.
    """

    def __init__(self, features: nn.Module, head: nn.Linear | DiagonalGaussians, *, recipe: Recipe) -> None:
        super().__init__()
        self.features, self.head, self.features_recipe = features, head, recipe

    def forward(self, x: Tensor) -> Tensor:
        """Classify.

        Args:
            x: shape ``(n, *input_shape)``.

        Returns:
            Logits, shape ``(n, num_classes)``.
        """
        logits: Tensor = self.head(self.features(x))
        return logits

    @property
    def recipe(self) -> dict[str, Any]:
        """What rebuilds it."""
        is_linear = isinstance(self.head, nn.Linear)
        size = self.head.weight.shape if isinstance(self.head, nn.Linear) else self.head.means.shape
        return {
            "kind": "headed",
            "features": self.features_recipe,
            "head": "linear" if is_linear else "diagonal_gaussians",
            "num_features": int(size[1]),
            "num_classes": int(size[0]),
        }


@register_recipe("headed")
def build_headed(recipe: Mapping[str, Any]) -> Headed:
    """Build features under a head.

    Args:
        recipe: what :attr:`Headed.recipe` gave.

    Returns:
        The module with fresh weights.

    Raises:
        ModelError: there is no such head.
    """
    if recipe["head"] not in HEADS:
        raise ModelError(f'there is no head "{recipe["head"]!s:.60}"', fix="use an artifact that fedfuse wrote")
    head: Any = HEADS[recipe["head"]](int(recipe["num_features"]), int(recipe["num_classes"]))
    return Headed(build(recipe["features"]), head, recipe=recipe["features"])
