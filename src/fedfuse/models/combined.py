"""An ensemble whose answers are combined by something that was learned, and what can combine them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse.core.artifact import Recipe, build
from fedfuse.core.errors import ModelError
from fedfuse.core.registry import register_recipe


class Combined(nn.Module):
    """Models side by side, and a small module that turns all their logits into one answer.

    Args:
        members: map inputs to logits, shape ``(n, num_classes)``.
        combiner: maps ``(n, num_members, num_classes)`` to ``(n, num_classes)``; has a ``recipe``.
        recipes: what rebuilds the members.
    """

    def __init__(self, members: Sequence[nn.Module], combiner: nn.Module, *, recipes: Sequence[Recipe] = ()) -> None:
        super().__init__()
        self.members, self.combiner, self.recipes = nn.ModuleList(members), combiner, list(recipes)

    def forward(self, x: Tensor) -> Tensor:
        """Answer together.

        Args:
            x: inputs, shape ``(n, *input_shape)``.

        Returns:
            Shape ``(n, num_classes)``.
        """
        answer: Tensor = self.combiner(member_logits(self.members, x))
        return answer

    @property
    def recipe(self) -> dict[str, Any]:
        """What rebuilds the ensemble and its combiner."""
        return {"kind": "combined", "members": self.recipes, "combiner": self.combiner.recipe}


def member_logits(members: Sequence[nn.Module] | nn.ModuleList, x: Tensor) -> Tensor:
    """What each of several models says.

    Args:
        members: map inputs to logits.
        x: inputs, shape ``(n, *input_shape)``.

    Returns:
        Shape ``(n, num_members, num_classes)``, float32.
    """
    return torch.stack([member(x).float() for member in members], 1)


class Aggregator(nn.Module):
    """A small network on all members' logits (FENS).

    Args:
        num_members: models in the ensemble.
        num_classes: number of outputs of each.
        width: hidden units per member.
    """

    def __init__(self, num_members: int, num_classes: int, width: int) -> None:
        super().__init__()
        if min(num_members, num_classes, width) < 1:
            raise ModelError(
                f"an aggregator of {num_members} members, {num_classes} classes and width {width}",
                fix="give at least 1 of each",
            )
        self.num_members, self.num_classes, self.width = num_members, num_classes, width
        self.hidden = nn.Linear(num_members * num_classes, num_members * width)
        self.out = nn.Linear(num_members * width, num_classes)

    def forward(self, logits: Tensor) -> Tensor:
        """Combine.

        Args:
            logits: shape ``(n, num_members, num_classes)``.

        Returns:
            Shape ``(n, num_classes)``.
        """
        answer: Tensor = self.out(self.hidden(logits.flatten(1)).relu())
        return answer

    @property
    def recipe(self) -> dict[str, Any]:
        """What rebuilds it."""
        facts = {"num_members": self.num_members, "num_classes": self.num_classes, "width": self.width}
        return {"kind": "aggregator", **facts}


class Weighted(nn.Module):
    """A weighted sum of the members' logits.

    Args:
        weights: one per member, shape ``(num_members,)``.
    """

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights: Tensor
        self.register_buffer("weights", weights.float())

    def forward(self, logits: Tensor) -> Tensor:
        """Combine.

        Args:
            logits: shape ``(n, num_members, num_classes)``.

        Returns:
            Shape ``(n, num_classes)``.
        """
        return torch.einsum("nkc,k->nc", logits, self.weights)

    @property
    def recipe(self) -> dict[str, Any]:
        """What rebuilds it."""
        return {"kind": "weighted", "num_members": len(self.weights)}


class Polychotomous(nn.Module):
    """Votes that count by how each member is known to confuse classes.

    The answer for class i is the sum over members k of log P_k(k predicts what it just did | the class is i).

    Args:
        log_likelihoods: log P_k(predicted = j | true = i), shape ``(num_members, true, predicted)``.
    """

    def __init__(self, log_likelihoods: Tensor) -> None:
        super().__init__()
        self.log_likelihoods: Tensor
        self.register_buffer("log_likelihoods", log_likelihoods.float())

    def forward(self, logits: Tensor) -> Tensor:
        """Combine.

        Args:
            logits: shape ``(n, num_members, num_classes)``.

        Returns:
            Shape ``(n, num_classes)``: log-probabilities up to a constant per row.
        """
        votes = nn.functional.one_hot(logits.argmax(2), logits.shape[2]).to(self.log_likelihoods.dtype)
        return torch.einsum("nkj,kij->ni", votes, self.log_likelihoods)

    @property
    def recipe(self) -> dict[str, Any]:
        """What rebuilds it."""
        num_members, num_classes = self.log_likelihoods.shape[:2]
        return {"kind": "polychotomous", "num_members": num_members, "num_classes": num_classes}


@register_recipe("combined")
def build_combined(recipe: Mapping[str, Any]) -> Combined:
    """Build an ensemble with its combiner.

    Args:
        recipe: what :attr:`Combined.recipe` gave.

    Returns:
        The ensemble with fresh members.
    """
    members = [build(member) for member in recipe["members"]]
    return Combined(members, build(recipe["combiner"]), recipes=recipe["members"])


@register_recipe("aggregator")
def build_aggregator(recipe: Mapping[str, Any]) -> Aggregator:
    """Build FENS's aggregator.

    Args:
        recipe: what :attr:`Aggregator.recipe` gave.
    """
    return Aggregator(recipe["num_members"], recipe["num_classes"], recipe["width"])


@register_recipe("weighted")
def build_weighted(recipe: Mapping[str, Any]) -> Weighted:
    """Build a weighted sum with equal weights.

    Args:
        recipe: what :attr:`Weighted.recipe` gave.
    """
    return Weighted(torch.full((recipe["num_members"],), 1 / recipe["num_members"]))


@register_recipe("polychotomous")
def build_polychotomous(recipe: Mapping[str, Any]) -> Polychotomous:
    """Build a vote in which no member is known to confuse anything with anything more than with the rest.

    Args:
        recipe: what :attr:`Polychotomous.recipe` gave.
    """
    return Polychotomous(torch.zeros(recipe["num_members"], recipe["num_classes"], recipe["num_classes"]))
