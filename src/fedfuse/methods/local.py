"""Every client alone."""

from __future__ import annotations

from dataclasses import dataclass

from fedfuse.core.cohort import Cohort
from fedfuse.core.method import Fused, Job, register_method
from fedfuse.methods.tasks import LocalTraining, client_artifact


@register_method("local", reference="baseline: no federation")
@dataclass(frozen=True, kw_only=True)
class Local(LocalTraining):
    """Every client alone: the accuracy that each has without any federation.

    Exchanges: one, ``local_models``. A real federation would not send anything; the upload is asked for so that the
    models can be compared, and other methods share it.

    Departures: none.

    Args:
        local: how clients train.
    """

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Collect the clients' models.

        Args:
            cohort: the clients.
            job: says which model each client owns.
        """
        replies = self.local_models(cohort, job)
        return Fused(personal={client_id: client_artifact(job, client_id, replies[client_id]) for client_id in replies})
