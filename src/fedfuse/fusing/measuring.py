"""How far what a rule made is from the exact weighted sum of the adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedfuse.ops.lora import Factors, distance, norm


@dataclass(frozen=True)
class ModuleError:
    """The distance from the exact sum in one weight.

    Args:
        distance: Frobenius norm of the difference.
        size: Frobenius norm of the exact sum.
    """

    distance: float
    size: float

    @property
    def relative(self) -> float:
        """Distance over size; 0 where both are zero."""
        if self.size == 0:
            return 0.0 if self.distance == 0 else math.inf
        return self.distance / self.size


def measure(exact: Factors, found: Factors) -> ModuleError:
    """Compare two changes of one weight.

    Args:
        exact: the weighted sum.
        found: what came out.

    Returns:
        Distance and size, from the factors alone.
    """
    return ModuleError(distance(exact, found), norm(exact))


def total(errors: Mapping[str, ModuleError]) -> ModuleError:
    """All weights together, as one long vector.

    Args:
        errors: by module.

    Returns:
        Distance and size.
    """
    return ModuleError(
        math.sqrt(math.fsum(error.distance**2 for error in errors.values())),
        math.sqrt(math.fsum(error.size**2 for error in errors.values())),
    )
