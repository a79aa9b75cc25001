"""Classifiers by likeness to prototypes: of one client, and of several encoders together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.core.artifact import Recipe, build
from fedfuse.core.errors import ModelError
from fedfuse.core.registry import register_recipe


class Prototypical(nn.Module):
    """An encoder whose unit features are compared with learnable prototypes.

    Args:
        encoder: maps inputs to features, shape ``(n, d)``.
        prototypes: first prototypes, shape ``(num_classes, d)``; copied.
    """

    def __init__(self, encoder: nn.Module, prototypes: Tensor) -> None:
        super().__init__()
        self.encoder, self.prototypes = encoder, nn.Parameter(prototypes.clone())

    def features(self, x: Tensor) -> Tensor:
        """Features of unit length.

        Args:
            x: inputs, shape ``(n, *input_shape)``.

        Returns:
            Shape ``(n, d)``, float32.
        """
        return F.normalize(self.encoder(x).float())

    def forward(self, x: Tensor) -> Tensor:
        """Classify.

        Args:
            x: inputs, shape ``(n, *input_shape)``.

        Returns:
            Logits, shape ``(n, num_classes)``.
        """
        return self.features(x) @ self.prototypes.T


class PrototypeEnsemble(nn.Module):
    """Encoders side by side; their unit features are weighed and compared with prototypes.

    With one set of prototypes the weighed features are added, made unit again and compared with it; with one set per
    encoder each feature meets its own encoder's prototypes, and the likenesses are added.

    Args:
        encoders: map inputs to features, shape ``(n, d_k)``.
        prototypes: one tensor ``(num_classes, d)`` or one per encoder.
        shares: weight of each encoder, shape ``(num_members,)``.
        references: unit feature that each encoder gives for noise, ``(d_k,)`` each; where there are any, an encoder
            counts by one minus the cosine of its feature with its reference. Empty: it counts by its share alone.
        recipes: what rebuilds the encoders.
    """

    def __init__(
        self,
        encoders: Sequence[nn.Module],
        prototypes: Sequence[Tensor],
        shares: Tensor,
        *,
        references: Sequence[Tensor] = (),
        recipes: Sequence[Recipe] = (),
    ) -> None:
        super().__init__()
        if len(prototypes) not in (1, len(encoders)) or len(references) not in (0, len(encoders)):
            raise ModelError(
                f"{len(encoders)} encoders came with {len(prototypes)} sets of prototypes and {len(references)} "
                "references",
                fix="give one set, or one per encoder, and a reference for none or for each",
            )
        self.encoders, self.recipes = nn.ModuleList(encoders), list(recipes)
        self.prototypes = nn.ParameterList([nn.Parameter(p.clone()) for p in prototypes])
        self.references = nn.ParameterList([nn.Parameter(r.clone(), requires_grad=False) for r in references])
        self.shares: Tensor
        self.register_buffer("shares", shares.float())

    def forward(self, x: Tensor) -> Tensor:
        """Classify.

        Args:
            x: inputs, shape ``(n, *input_shape)``.

        Returns:
            Logits, shape ``(n, num_classes)``.
        """
        weighed = []
        for position, encoder in enumerate(self.encoders):
            feature = F.normalize(encoder(x).float())
            weight = self.shares[position]
            if len(self.references):
                weight = weight * (1 - feature @ self.references[position])[:, None]
            weighed.append(weight * feature)
        if len(self.prototypes) == 1:
            joint = torch.stack(weighed).sum(0)
            return F.linear(F.normalize(joint), self.prototypes[0])
        likenesses = [F.linear(f, p) for f, p in zip(weighed, self.prototypes, strict=True)]
        return torch.stack(likenesses).sum(0)

    @property
    def recipe(self) -> dict[str, Any]:
        """What rebuilds the encoders, and the sizes of the rest."""
        return {
            "kind": "prototype_ensemble",
            "encoders": self.recipes,
            "prototypes": [list(p.shape) for p in self.prototypes],
            "references": [len(r) for r in self.references],
        }


@register_recipe("prototype_ensemble")
def build_prototype_ensemble(recipe: Mapping[str, Any]) -> PrototypeEnsemble:
    """Build an ensemble of encoders.

    Args:
        recipe: what :attr:`PrototypeEnsemble.recipe` gave.

    Returns:
        The ensemble with fresh encoders and empty prototypes.
    """
    encoders = [build(encoder) for encoder in recipe["encoders"]]
    return PrototypeEnsemble(
        encoders,
        [torch.zeros(num_classes, d) for num_classes, d in recipe["prototypes"]],
        torch.full((len(encoders),), 1 / max(1, len(encoders))),
        references=[torch.zeros(d) for d in recipe["references"]],
        recipes=recipe["encoders"],
    )
