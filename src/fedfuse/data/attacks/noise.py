"""Noise instead of what was learned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError
from fedfuse.core.registry import register_attack
from fedfuse.data.attacks.attack import Attack


@register_attack("noise")
@dataclass(frozen=True, kw_only=True)
class Noise(Attack):
    """A hostile client sends Gaussian noise around the weights that it was sent (Blanchard et al., NeurIPS 2017).

    Args:
        factor: size of the noise in each tensor, in sizes of what an honest client would have learned, above 0.
    """

    factor: float = 4.0

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ConfigError(f"factor is {self.factor}", where="attack.factor", fix="give a number above 0")

    def forge(self, values: Tensor, start: Tensor, generator: torch.Generator) -> Tensor:
        """Draw noise with the root mean square of the difference, times the factor.

        Args:
            values: what was learned.
            start: where it began.
            generator: where the noise is drawn from.
        """
        size = (values - start).square().mean().sqrt()
        return start + self.factor * size * torch.randn(values.shape, generator=generator, dtype=values.dtype)
