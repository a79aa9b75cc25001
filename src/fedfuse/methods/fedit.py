"""The mean of the clients' LoRA factors, A and B each apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedfuse.core.cohort import Cohort
from fedfuse.core.method import Fused, Job, register_method
from fedfuse.methods.adapters import ClientAdapters
from fedfuse.methods.fedavg import FedAvg, check_homogeneous
from fedfuse.methods.tasks import MODEL_SUMS


@register_method("fedit", paper="https://arxiv.org/abs/2305.05644", reference="Zhang et al., ICASSP 2024")
@dataclass(frozen=True, kw_only=True)
class FedIT(FedAvg):
    """FedAvg of LoRA adapters: the mean of all A and the mean of all B, weighted by numbers of examples.

    Zhang et al., ICASSP 2024. The product of the two means is not the mean of the products: it also multiplies each
    client's B with the others' A. ``flora``, ``fedex_lora`` and ``flexlora`` fuse the same uploads better.

    Exchanges: ``num_rounds``; each uploads adapter and head. With one round it is the question that every one-round
    method asks.

    Departures: every client takes part in every round. Heads, and the magnitudes of DoRA, are averaged.
    ``local.num_epochs`` is the total over all rounds.

    Args:
        local: how clients train.
        num_rounds: rounds of averaging, at least 1.
    """

    sums: ClassVar[Mapping[str, Mapping[str, str]]] = {"train_local": MODEL_SUMS}

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Average, send, train, and again.

        Args:
            cohort: the clients.
            job: the common model, with a LoRA adapter.
        """
        check_homogeneous(job)
        ClientAdapters.of(job, self.name, takes_magnitudes=True)
        return super().fuse(cohort, job)
