"""What was sent goes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError
from fedfuse.core.registry import register_attack
from fedfuse.data.attacks.attack import Attack


@register_attack("free_rider")
@dataclass(frozen=True, kw_only=True)
class FreeRider(Attack):
    """A hostile client learns nothing: it sends what it was sent, or the first weights, with a little noise.

    Plain free riders of Fraboni et al., AISTATS 2021. It still claims its number of examples.

    Args:
        noise_std: standard deviation of the noise that hides it, 0 or more.
    """

    forges_buffers: ClassVar[bool] = True

    noise_std: float = 1e-4

    def __post_init__(self) -> None:
        if not self.noise_std >= 0:
            raise ConfigError(f"noise_std is {self.noise_std}", where="attack.noise_std", fix="give 0 or more")

    def forge(self, values: Tensor, start: Tensor, generator: torch.Generator) -> Tensor:
        """The start and some noise.

        Args:
            values: what was learned; not used.
            start: where it began.
            generator: where the noise is drawn from.

        Example:
            >>> FreeRider(noise_std=0).forge(torch.tensor(4.0), torch.tensor(3.0), torch.Generator()).item()
            3.0
        """
        return start + self.noise_std * torch.randn(values.shape, generator=generator, dtype=values.dtype)
