"""The opposite of what was learned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError
from fedfuse.core.registry import register_attack
from fedfuse.data.attacks.attack import Attack


@register_attack("sign_flip")
@dataclass(frozen=True, kw_only=True)
class SignFlip(Attack):
    """A hostile client goes the other way: its difference to the weights that it was sent has the opposite sign.

    Args:
        factor: how many times as far, above 0. With 2 hostile clients of 10, a factor of 4 cancels the mean.
    """

    factor: float = 4.0

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ConfigError(f"factor is {self.factor}", where="attack.factor", fix="give a number above 0")

    def forge(self, values: Tensor, start: Tensor, generator: torch.Generator) -> Tensor:
        """Turn the difference round.

        Args:
            values: what was learned.
            start: where it began.
            generator: not used.

        Example:
            >>> SignFlip(factor=2.0).forge(torch.tensor(4.0), torch.tensor(3.0), torch.Generator()).item()
            1.0
        """
        return start - self.factor * (values - start)
