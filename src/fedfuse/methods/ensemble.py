"""All clients' models side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fedfuse.core.artifact import Artifact, detached_state
from fedfuse.core.cohort import Cohort
from fedfuse.core.method import Fused, Job, register_method
from fedfuse.methods.tasks import LocalTraining, check_classifiers, client_artifact
from fedfuse.models.ensemble import Ensemble


@register_method("ensemble", reference="baseline")
@dataclass(frozen=True, kw_only=True)
class EnsembleMethod(LocalTraining):
    """All clients' models side by side; their answers are combined at every prediction.

    Exchanges: one, ``local_models``.

    Departures: ``label_count`` weighs probabilities, not logits as the FENS code does, because weighted logits of
    models with different scales have no meaning of their own.

    Args:
        local: how clients train.
        combine: ``mean_logits``, ``mean_probabilities``, ``vote``, or ``label_count``: each model's probability of a
            class counts by that client's share of the class's examples.
    """

    combine: Literal["mean_logits", "mean_probabilities", "vote", "label_count"] = "mean_logits"

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Put the models side by side.

        Args:
            cohort: the clients.
            job: says which model each client owns.
        """
        check_classifiers(job)
        replies = self.local_models(cohort, job)
        artifacts = [client_artifact(job, client_id, replies[client_id]) for client_id in replies]
        net = Ensemble(
            [artifact.module() for artifact in artifacts],
            combine=self.combine,
            num_classes=job.model.num_classes,
            recipes=[artifact.recipe for artifact in artifacts],
        )
        if self.combine == "label_count":
            counts = torch.stack([replies[client_id].tensor("label_counts") for client_id in replies]).double()
            net.weights.copy_(counts / counts.sum(0).clamp(min=1))
        is_opaque = any(artifact.template is not None for artifact in artifacts)
        return Fused(model=Artifact(net.recipe, detached_state(net), template=net if is_opaque else None))
