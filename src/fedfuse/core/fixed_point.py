"""Settings of secure aggregation, and the fixed point in which numbers are counted so that their sum is exact."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedfuse.core.errors import ConfigError

SUMS_WHERE = "federation.secure_aggregation"
"""The section of the configuration."""

TOTAL_BITS = 62
"""Totals stay up to 2^62 in size: one beyond it is none, which almost surely shows masks that did not cancel."""

_LEAST_BITS = 20
"""Fewer bits behind the range would make a mean wrong by more than a millionth of the range."""


@dataclass(frozen=True, kw_only=True)
class SumSettings:
    """What the operator decides about secure aggregation: ``federation.secure_aggregation``.

    Args:
        num_shares: among how many clients, itself included, each client's secrets are shared, an odd number of at
            least 3; ``None`` is all of them. Fewer cost less in large federations and bear fewer faults.
        reconstruction_threshold: part of the shares that must come back, above 0.5 and up to 1. As many clients could
            together lay a client's secrets open; if fewer stay to the end there is no sum.
        clipping_range: largest size of a number that is averaged, above 0. A client that has a larger one says so and
            takes no part; nothing is clipped in silence.
        max_weight: largest weight of a client, such as its number of examples, at least 1. Numbers that are added and
            not averaged may be ``clipping_range`` times ``max_weight`` in size.
        stage_timeout_s: most seconds that a client may take for each of the three short stages after its task.
    """

    num_shares: int | None = None
    reconstruction_threshold: float = 2 / 3
    clipping_range: float = 2.0**14
    max_weight: int = 2**20
    stage_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        if self.num_shares is not None and (self.num_shares < 3 or self.num_shares % 2 == 0):
            raise ConfigError(
                f"num_shares is {self.num_shares}",
                where=f"{SUMS_WHERE}.num_shares",
                fix="give an odd number of at least 3",
            )
        if not 0.5 < self.reconstruction_threshold <= 1:
            raise ConfigError(
                f"reconstruction_threshold is {self.reconstruction_threshold}",
                where=f"{SUMS_WHERE}.reconstruction_threshold",
                fix="give a number above 0.5, at most 1",
            )
        if not 0 < self.clipping_range < math.inf:
            raise ConfigError(
                f"clipping_range is {self.clipping_range}",
                where=f"{SUMS_WHERE}.clipping_range",
                fix="give a number above 0",
            )
        if self.max_weight < 1:
            fix = "give at least 1"
            raise ConfigError(f"max_weight is {self.max_weight}", where=f"{SUMS_WHERE}.max_weight", fix=fix)
        if not self.stage_timeout_s > 0:
            raise ConfigError(
                f"stage_timeout_s is {self.stage_timeout_s}",
                where=f"{SUMS_WHERE}.stage_timeout_s",
                fix="give a number above 0",
            )

    def threshold(self, num_shares: int) -> int:
        """How many of some shares must come back: always more than half, and at least 2.

        Args:
            num_shares: how many there are.

        Example:
            >>> [SumSettings().threshold(n) for n in (2, 3, 5, 9)]
            [2, 2, 4, 6]
        """
        wanted = math.ceil(self.reconstruction_threshold * num_shares - 1e-9)
        return max(2, num_shares // 2 + 1, wanted)


@dataclass(frozen=True)
class FixedPoint:
    """How numbers become integers whose sum over all clients cannot overflow.

    Args:
        settings: range and largest weight.
        num_clients: most clients that are added up.

    Raises:
        ConfigError: too few bits would be left behind the point.
    """

    settings: SumSettings
    num_clients: int

    def __post_init__(self) -> None:
        if TOTAL_BITS - _ceil_log2(self.num_clients) - _ceil_log2(self.settings.max_weight) < _LEAST_BITS:
            raise ConfigError(
                f"the sum of {self.num_clients:,} clients with weights up to {self.settings.max_weight:,} has too few"
                " bits to be right",
                where=f"{SUMS_WHERE}.max_weight",
                fix="give a smaller max_weight",
            )

    @property
    def integer_limit(self) -> int:
        """Largest size of one client's integer."""
        return 1 << (TOTAL_BITS - _ceil_log2(self.num_clients))

    @property
    def num_bits(self) -> int:
        """Bits behind the point: a number is counted in units of 2 to the power of minus this."""
        whole = math.ceil(math.log2(self.settings.clipping_range)) + _ceil_log2(self.settings.max_weight)
        return TOTAL_BITS - _ceil_log2(self.num_clients) - whole

    def error_of_mean(self, weight: float) -> float:
        """How far a weighted mean may be from the true one; what its dtype then rounds off comes on top.

        Args:
            weight: sum of the clients' weights, above 0.

        Returns:
            At most ``clipping_range`` times 1e-6.
        """
        return self.error_of_sum / weight + self.settings.clipping_range * 2.0**-51

    @property
    def error_of_sum(self) -> float:
        """How far a plain sum may be from the true one: half a unit per client."""
        return math.ldexp(0.5 * self.num_clients, -self.num_bits)


def _ceil_log2(number: int) -> int:
    return int(number - 1).bit_length()
