"""A mixture of experts whose gate decides, input by input, whom to believe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse.core.artifact import Recipe, build
from fedfuse.core.errors import ModelError
from fedfuse.core.registry import register_recipe


class Gate(nn.Module):
    """A linear layer on the flattened input gives one weight per expert; only the largest count.

    At first every expert has weight 1, so that the mixture is the uniform ensemble.

    Args:
        num_inputs: values of one input.
        num_experts: how many there are.
        top_k: how many of them count for an input, at least 1.

    Raises:
        ModelError: ``top_k`` is no number from 1 to the number of experts.
    """

    def __init__(self, num_inputs: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ModelError(
                f"top_k is {top_k} and there are {num_experts} experts", fix="give a number from 1 to that of experts"
            )
        self.top_k = top_k
        self.linear = nn.Linear(num_inputs, num_experts)
        nn.init.zeros_(self.linear.weight)
        nn.init.ones_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Weigh the experts.

        Args:
            x: inputs, shape ``(n, *input_shape)``.

        Returns:
            Shape ``(n, num_experts)``; 0 for experts that do not count.
        """
        weights: Tensor = self.linear(x.flatten(1))
        if self.top_k < weights.shape[1]:
            chosen = weights.topk(self.top_k, 1).indices
            weights = weights * torch.zeros_like(weights).scatter(1, chosen, 1.0)
        return weights


def mixed_logits(weights: Tensor, logits: Tensor, top_k: int) -> Tensor:
    """The answer of a mixture.

    Args:
        weights: of the experts, shape ``(n, num_experts)``.
        logits: the experts' answers, shape ``(num_experts, n, num_classes)``.
        top_k: how many experts count for an input.

    Returns:
        The weighted sum over experts divided by ``top_k``, shape ``(n, num_classes)``.
    """
    return torch.einsum("nm,mnc->nc", weights, logits) / top_k


class Mixture(nn.Module):
    """Experts and the gate that weighs them.

    Args:
        experts: map inputs to logits.
        gate: maps inputs to weights of the experts.
        recipes: what rebuilds the experts.
    """

    def __init__(self, experts: Sequence[nn.Module], gate: Gate, *, recipes: Sequence[Recipe] = ()) -> None:
        super().__init__()
        self.experts, self.gate, self.recipes = nn.ModuleList(experts), gate, list(recipes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify.

        Args:
            x: inputs, shape ``(n, *input_shape)``.

        Returns:
            Logits, shape ``(n, num_classes)``.
        """
        return mixed_logits(self.gate(x), torch.stack([expert(x) for expert in self.experts]), self.gate.top_k)

    @property
    def recipe(self) -> dict[str, Any]:
        """What rebuilds the mixture."""
        facts = {"num_inputs": self.gate.linear.in_features, "top_k": self.gate.top_k}
        return {"kind": "mixture", "experts": self.recipes, **facts}


@register_recipe("mixture")
def build_mixture(recipe: Mapping[str, Any]) -> Mixture:
    """Build a mixture.

    Args:
        recipe: what :attr:`Mixture.recipe` gave.

    Returns:
        The mixture with fresh weights.
    """
    experts = [build(expert) for expert in recipe["experts"]]
    gate = Gate(int(recipe["num_inputs"]), len(experts), int(recipe["top_k"]))
    return Mixture(experts, gate, recipes=recipe["experts"])
