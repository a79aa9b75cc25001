"""What a rule for low-rank adapters is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fedfuse.core.errors import ConfigError, ModelError
from fedfuse.ops.lora import Factors, truncated


@dataclass(frozen=True)
class FusedChange:
    """What a rule makes of the adapters' changes of one weight.

    Args:
        adapter: what the fused adapter holds.
        residual: what is to be added to the base's weight besides; nothing if left out.
    """

    adapter: Factors
    residual: Factors | None = None


@dataclass(frozen=True, kw_only=True)
class AdapterRule:
    """Base of all rules for adapters.

    A rule sees the adapters' changes of one weight at a time. An adapter that does not touch this weight takes part
    with a change of rank 0.

    ``is_exact``: adapter and residual together are the weighted sum of the changes. ``of_factors``: the result's
    factors are made of the adapters' left factors and of their right factors, each apart. ``of_whole_models``:
    ``reweigh`` is first shown how far apart the whole adapters are. ``makes_adapter``: the result is an adapter.
    """

    is_exact: ClassVar[bool] = False
    makes_adapter: ClassVar[bool] = True

    @property
    def of_factors(self) -> bool:
        """Whether left and right factors are fused apart."""
        return False

    @property
    def of_whole_models(self) -> bool:
        """Whether whole adapters are compared first."""
        return False

    @property
    def residual_goes(self) -> Literal["nowhere", "apart", "base"]:
        """Into which file a residual is written: an adapter of its own, or the base model."""
        return "nowhere"

    def reweigh(self, distances: Tensor, weights: Tensor) -> Tensor:
        """Change the adapters' weights by what they look like as a whole.

        Args:
            distances: squared distances between the changes, shape ``(num_adapters, num_adapters)``, float64.
            weights: shape ``(num_adapters,)``, float64, sums to 1.

        Returns:
            Shape ``(num_adapters,)``, float64, sums to 1.
        """
        return weights

    def check_shape(self, module: str, shape: tuple[int, int]) -> None:
        """Refuse a weight that the rule cannot fuse, before anything is read.

        Args:
            module: its name.
            shape: ``(d_out, d_in)``.

        Raises:
            ModelError: it cannot be fused.
        """

    def fuse(self, parts: Sequence[Factors], weights: Sequence[float], module: str) -> FusedChange:
        """Fuse the adapters' changes of one weight.

        Args:
            parts: one per adapter, with the scale in the left factor.
            weights: one per adapter, sum to 1.
            module: the weight's name.

        Returns:
            The fused change.
        """
        raise NotImplementedError


def check_rank(rank: int | None) -> None:
    """Refuse a rank that no adapter has.

    Args:
        rank: as it was given.

    Raises:
        ConfigError: it is below 1.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"rank is {rank}", where="rule.rank", fix="give at least 1")


def check_rank_fits(rank: int | None, module: str, shape: tuple[int, int]) -> None:
    """Refuse a rank that is not low for a weight.

    Args:
        rank: as it was given; nothing is always low enough.
        module: the weight's name.
        shape: ``(d_out, d_in)``.

    Raises:
        ModelError: it is not below both dimensions.
    """
    if rank is not None and rank >= min(shape):
        raise ModelError(
            f'the rank {rank} is not low for "{module}", which is {shape[0]} x {shape[1]}',
            where="rank",
            fix=f"give a rank below {min(shape)}",
        )


def within_shape(factors: Factors) -> Factors:
    """The same change, with no higher rank than its weight can have.

    Args:
        factors: the change.

    Returns:
        The factors themselves where their rank is low enough.
    """
    return factors if factors.rank <= min(factors.shape) else truncated(factors, min(factors.shape))
