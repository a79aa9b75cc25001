"""Several models that answer together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse.core.artifact import Recipe, build
from fedfuse.core.errors import ModelError
from fedfuse.core.judging import JudgesItself
from fedfuse.core.registry import register_recipe

COMBINE = ("mean_logits", "mean_probabilities", "vote", "label_count")


class Ensemble(nn.Module):
    """Models side by side, their answers combined.

    ``mean_logits`` and ``mean_probabilities`` average; ``vote`` counts predictions; ``label_count`` weighs each
    model's probability of a class by its weight for that class. All but the first give log-probabilities, so that the
    largest wins and cross-entropy is defined.

    Args:
        members: map inputs to logits.
        combine: one of the above.
        num_classes: number of outputs.
        recipes: what rebuilds the members.
    """

    def __init__(
        self, members: Sequence[nn.Module], *, combine: str, num_classes: int, recipes: Sequence[Recipe] = ()
    ) -> None:
        super().__init__()
        if combine not in COMBINE:
            raise ModelError(f'there is no ensemble "{combine}"', fix=f"use one of {', '.join(COMBINE)}")
        check_classifies(members)
        self.members, self.combine, self.recipes = nn.ModuleList(members), combine, list(recipes)
        self.weights: Tensor
        # Shape (num_members, num_classes): how much each member counts for each class.
        self.register_buffer("weights", torch.full((len(members), num_classes), 1 / len(members)))

    def forward(self, x: Tensor) -> Tensor:
        """Answer together.

        Args:
            x: inputs, shape ``(n, *input_shape)``.

        Returns:
            Shape ``(n, num_classes)``.
        """
        total = self._part(0, x)
        for position in range(1, len(self.members)):
            total = total + self._part(position, x)
        return total if self.combine == "mean_logits" else (total + 1e-12).log()

    def _part(self, position: int, x: Tensor) -> Tensor:
        answer: Tensor = self.members[position](x)
        if self.combine == "vote":
            answer = nn.functional.one_hot(answer.argmax(1), answer.shape[1]).to(answer.dtype)
        elif self.combine != "mean_logits":
            answer = answer.softmax(1)
        return answer * self.weights[position]

    @property
    def recipe(self) -> dict[str, Any]:
        """What rebuilds the ensemble."""
        facts = {"combine": self.combine, "num_classes": int(self.weights.shape[1])}
        return {"kind": "ensemble", "members": self.recipes, **facts}


def check_classifies(members: Sequence[nn.Module]) -> None:
    """Refuse models that have no classes to combine.

    Args:
        members: models.

    Raises:
        ModelError: one writes text or draws pictures.
    """
    if any(isinstance(member, JudgesItself) for member in members):
        raise ModelError(
            "models that write or draw have no classes to combine",
            where="method.name",
            fix="use a method that fuses weights, such as fedavg, or fedit and flora for adapters",
        )


@register_recipe("ensemble")
def build_ensemble(recipe: Mapping[str, Any]) -> Ensemble:
    """Build an ensemble.

    Args:
        recipe: what :attr:`Ensemble.recipe` gave.

    Returns:
        The ensemble with fresh members.
    """
    members = [build(member) for member in recipe["members"]]
    return Ensemble(members, combine=recipe["combine"], num_classes=recipe["num_classes"], recipes=recipe["members"])
