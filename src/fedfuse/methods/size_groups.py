"""Federated averaging among clients with equal models."""

from __future__ import annotations

from dataclasses import dataclass

from fedfuse.core.artifact import Artifact
from fedfuse.core.cohort import Cohort
from fedfuse.core.method import Fused, Job, register_method
from fedfuse.methods.sizes import OwnSizes, State
from fedfuse.methods.tasks import example_weights
from fedfuse.rules import fuse_uploads
from fedfuse.rules.mean import Mean


@register_method("size_groups", reference="baseline: one federation per model")
@dataclass(frozen=True, kw_only=True)
class SizeGroups(OwnSizes):
    """FedAvg in groups: clients with equal models average among themselves, and learn nothing from the others.

    Every client keeps the full capacity of its own model, but sees the data of its group only.

    Exchanges: ``num_rounds``; each uploads the whole model. With one round it is the question that every one-round
    method asks. Where all clients own the same model, this is FedAvg.

    Departures: none.

    Args:
        local: how clients train; ``local.num_epochs`` is the total over all rounds.
        num_rounds: rounds, at least 1.
    """

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Average within each group, send, and again.

        Args:
            cohort: the clients.
            job: says which model each client owns.
        """
        groups: dict[str, list[str]] = {}
        for client_id in cohort.client_ids:
            groups.setdefault(job.model_of(client_id).digest, []).append(client_id)
        states: dict[str, State] = {}
        for number in range(self.num_rounds):
            replies = self.ask_models(
                cohort, job, number, {c: states[g] for g, members in groups.items() if g in states for c in members}
            )
            weights = dict(zip(replies, example_weights(replies), strict=True))
            uploads = dict(zip(replies, replies.uploads(), strict=True))
            for group, members in groups.items():
                heard = [client_id for client_id in members if client_id in uploads]
                # A group of which nobody answered keeps what it has.
                if heard:
                    parts, shares = [uploads[c] for c in heard], [weights[c] for c in heard]
                    states[group] = fuse_uploads(parts, Mean(), shares)
        job.facts["groups"] = sorted(groups.values())
        artifacts = {
            client_id: Artifact.of(job.model_of(client_id), states[group])
            for group, members in groups.items()
            if group in states
            for client_id in members
        }
        if len(groups) == 1:
            return Fused(model=next(iter(artifacts.values())))
        return Fused(personal=dict(sorted(artifacts.items())))
