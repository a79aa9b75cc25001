"""Training on wrong labels."""

from __future__ import annotations

from dataclasses import dataclass

from fedfuse.core.examples import Examples
from fedfuse.core.registry import register_attack
from fedfuse.core.seeding import Rng
from fedfuse.data.attacks.attack import Attack, Inputs


@register_attack("label_flip")
@dataclass(frozen=True, kw_only=True)
class LabelFlip(Attack):
    """A hostile client trains with the label c - 1 - y instead of y, for c classes.

    Its success is the share of test examples that get their flipped label.
    """

    def poison(self, examples: Examples, inputs: Inputs, rng: Rng) -> Examples:
        """Flip all labels.

        Args:
            examples: the client's own.
            inputs: tells the number of classes.
            rng: not used.

        Example:
            >>> import torch
            >>> from fedfuse.data.normalize import Normalization
            >>> examples = Examples(torch.zeros(3, 1), torch.tensor([0, 1, 2]))
            >>> LabelFlip().poison(examples, Inputs(3, Normalization()), Rng(0)).y.tolist()
            [2, 1, 0]
        """
        return Examples(examples.x, inputs.num_classes - 1 - examples.y)

    def wanted(self, test: Examples, inputs: Inputs) -> Examples:
        """Flipped labels, without the class in the middle, which stays what it is.

        Args:
            test: honest test examples.
            inputs: tells the number of classes.
        """
        flipped = inputs.num_classes - 1 - test.y
        rows = (flipped != test.y).nonzero().flatten()
        return Examples(test.x[rows], flipped[rows])
