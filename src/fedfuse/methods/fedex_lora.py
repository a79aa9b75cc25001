"""Averaged adapters, and what the average misses added to the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedfuse.core.cohort import Cohort
from fedfuse.core.method import Fused, Job, register_method
from fedfuse.methods.adapters import FoldingRounds, rounded
from fedfuse.methods.fedavg import check_homogeneous
from fedfuse.ops.lora import Factors, averaged, residual


@register_method("fedex_lora", paper="https://arxiv.org/abs/2410.09432", reference="Singhal et al., ACL 2025")
@dataclass(frozen=True, kw_only=True)
class FedExLora(FoldingRounds):
    """FedIT made exact: the mean of the product minus the product of the means is added to the base's weights.

    Singhal et al., ACL 2025: W <- W + sum w_i B_i A_i - (sum w_i B_i)(sum w_i A_i), and training goes on with the
    averaged A and B, at the rank that they had.

    Exchanges: ``num_rounds``; each uploads adapter and head. After every round but the last, the averaged adapter and
    the residual, as factors of the rank that it has, go to all clients. With one round it is the question of fedit,
    flora and flexlora.

    Departures: the mean is weighted by examples. The residual travels as factors, not as a full matrix, and is taken
    against the averaged factors as they are rounded for travel. In the result, residual and average are one adapter
    of higher rank, which loads with the base that everyone has. Heads are averaged. ``local.num_epochs`` is the total
    over all rounds.

    Args:
        local: how clients train.
        num_rounds: at least 1.
    """

    takes_heterogeneous: ClassVar[bool] = False

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Ask, average, add the residual to the base, and again.

        Args:
            cohort: the clients.
            job: the common model.
        """
        check_homogeneous(job)
        return super().fuse(cohort, job)

    def split(self, parts: Sequence[Factors], shares: Sequence[float]) -> tuple[Factors, Factors | None]:
        """The residual goes into the base, the mean of the factors trains on.

        Args:
            parts: one per client.
            shares: of the examples, one per client.

        Returns:
            Residual and mean; together the exact sum.
        """
        mean = rounded(averaged(parts, shares))
        return residual(parts, shares, mean), mean
