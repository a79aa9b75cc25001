"""What Gaussian noise guarantees: the exact trade-off between epsilon and delta, alone and repeated.

The noise multiplier is the noise's standard deviation divided by the most that one neighbour can change the released
vector in L2. Releases of equal noise compose exactly: k of them protect as much as one with the multiplier divided by
the square root of k. So no numerical accountant is needed here, and nothing is lost to a bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from fedfuse.core.errors import ConfigError

_PRECISION = 1e-10


def gaussian_delta(noise_multiplier: float, epsilon: float, num_releases: int = 1) -> float:
    """The smallest delta of Gaussian noise at an epsilon.

    Balle and Wang, ICML 2018, theorem 8, https://arxiv.org/abs/1805.06530.

    Args:
        noise_multiplier: above 0.
        epsilon: 0 or more.
        num_releases: how many releases of this noise there are, at least 1.

    Returns:
        Delta in [0, 1].

    Example:
        >>> round(gaussian_delta(1.0, 1.0), 6)
        0.126937
    """
    shift = math.sqrt(num_releases) / noise_multiplier
    near, far = _log_normal_cdf(shift / 2 - epsilon / shift), epsilon + _log_normal_cdf(-shift / 2 - epsilon / shift)
    return min(1.0, max(0.0, math.exp(near) - math.exp(min(far, near))))


def gaussian_epsilon(noise_multiplier: float, delta: float, num_releases: int = 1) -> float:
    """The smallest epsilon of Gaussian noise at a delta.

    Args:
        noise_multiplier: 0 or more; without noise there is no guarantee.
        delta: in (0, 1).
        num_releases: how many releases of this noise there are; 0 reveals nothing.

    Returns:
        Epsilon; infinite without noise.

    Example:
        >>> round(gaussian_epsilon(1.0, 1e-5), 3), round(gaussian_epsilon(2.0, 1e-5, num_releases=4), 3)
        (4.377, 4.377)
    """
    if num_releases == 0:
        return 0.0
    if noise_multiplier <= 0:
        return math.inf
    return _first_below(delta, lambda epsilon: gaussian_delta(noise_multiplier, epsilon, num_releases))


def gaussian_noise_multiplier(epsilon: float, delta: float, num_releases: int = 1) -> float:
    """The least noise with which all releases together keep an epsilon.

    Args:
        epsilon: of all releases together, above 0.
        delta: in (0, 1).
        num_releases: how many there are, at least 1.

    Returns:
        The noise multiplier of each.

    Raises:
        ConfigError: no noise can keep such an epsilon.

    Example:
        >>> round(gaussian_noise_multiplier(4.377, 1e-5), 3)
        1.0
    """
    if not (epsilon > 0 and 0 < delta < 1 and math.isfinite(epsilon)):
        raise ConfigError(
            f"no noise can be made for epsilon {epsilon:g} and delta {delta:g}",
            where="privacy",
            fix="give an epsilon above 0 and a delta between 0 and 1",
        )
    return _first_below(delta, lambda multiplier: gaussian_delta(max(multiplier, 1e-9), epsilon, num_releases))


def _first_below(limit: float, falling: Callable[[float], float]) -> float:
    """The smallest number, 0 or more, at which a falling function is at most the limit; never below it."""
    if falling(0.0) <= limit:
        return 0.0
    low, high = 0.0, 1.0
    while falling(high) > limit:
        low, high = high, 2 * high
    while high - low > _PRECISION * high:
        middle = (low + high) / 2
        low, high = (low, middle) if falling(middle) <= limit else (middle, high)
    return high


def _log_normal_cdf(x: float) -> float:
    return float(torch.special.log_ndtr(torch.tensor(x, dtype=torch.float64)))
