"""Much more of what was learned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError
from fedfuse.core.registry import register_attack
from fedfuse.data.attacks.attack import Attack


@register_attack("scaled")
@dataclass(frozen=True, kw_only=True)
class Scaled(Attack):
    """A hostile client enlarges what it learned, so that a mean is mostly its own (Bagdasaryan et al., AISTATS 2020).

    Args:
        factor: what the difference to the weights that it was sent is multiplied by, above 0; the number of clients
            replaces their mean by the hostile client's own model.
    """

    factor: float = 10.0

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ConfigError(f"factor is {self.factor}", where="attack.factor", fix="give a number above 0")

    def forge(self, values: Tensor, start: Tensor, generator: torch.Generator) -> Tensor:
        """Multiply the difference.

        Args:
            values: what was learned.
            start: where it began.
            generator: not used.

        Example:
            >>> Scaled(factor=10.0).forge(torch.tensor(4.0), torch.tensor(3.0), torch.Generator()).item()
            13.0
        """
        return start + self.factor * (values - start)
