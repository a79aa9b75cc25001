"""Adaptive steps of a server: FedAdam, FedYogi and FedAdagrad."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Adaptive = Literal["adam", "yogi", "adagrad"]


@dataclass(frozen=True, kw_only=True)
class AdaptiveStep:
    """One server optimiser; its state is handed in and out, nothing is kept here.

    Args:
        kind: how second moments follow the squared changes (Reddi et al., algorithm 2).
        learning_rate: eta.
        first_decay: beta_1, in [0, 1).
        second_decay: beta_2, in [0, 1); adagrad has none.
        floor: tau, above 0: what is added to the root of the second moment.
    """

    kind: Adaptive
    learning_rate: float
    first_decay: float
    second_decay: float
    floor: float

    def __call__(self, change: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The step for one tensor; no bias is corrected.

        Args:
            change: mean of the clients' changes, any shape.
            first: first moment so far, same shape.
            second: second moment so far, same shape.

        Returns:
            What to add to the weights, and the two moments.

        Example:
            >>> adam = AdaptiveStep(kind="adam", learning_rate=1.0, first_decay=0.5, second_decay=0.75, floor=1.0)
            >>> [t.item() for t in adam(torch.tensor(4.0), torch.tensor(0.0), torch.tensor(0.0))]
            [0.6666666865348816, 2.0, 4.0]
        """
        squared = change.square()
        first = self.first_decay * first + (1 - self.first_decay) * change
        if self.kind == "adagrad":
            second = second + squared
        elif self.kind == "adam":
            second = self.second_decay * second + (1 - self.second_decay) * squared
        else:
            second = second - (1 - self.second_decay) * squared * torch.sign(second - squared)
        return self.learning_rate * first / (second.sqrt() + self.floor), first, second
