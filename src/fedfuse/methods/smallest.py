"""Federated averaging of the smallest of the clients' models."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedfuse.core.artifact import Artifact, load_state
from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort
from fedfuse.core.method import Fused, Job, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.methods.sizes import OwnSizes, State, all_models, received
from fedfuse.methods.tasks import MODEL_UPLOADS, example_weights, trained_upload
from fedfuse.rules import fuse_uploads
from fedfuse.rules.mean import Mean


@register_method("smallest", reference="baseline: the smallest model for everybody")
@dataclass(frozen=True, kw_only=True)
class Smallest(OwnSizes):
    """FedAvg of the smallest model, which everybody can train, whatever model a client owns.

    What a federation of unequal clients does that knows only averaging: nobody gets more than the weakest can hold.

    Exchanges: ``num_rounds``; each uploads the smallest model. Where all clients own the same model, this is FedAvg,
    and asks FedAvg's questions.

    Departures: none.

    Args:
        local: how clients train; ``local.num_epochs`` is the total over all rounds.
        num_rounds: rounds, at least 1.
    """

    @client_task(uploads=MODEL_UPLOADS, settings=("local",))
    def train_smallest(self, client: Client, msg: Payload) -> Payload:
        """Train the smallest model and upload it.

        Args:
            client: the client.
            msg: ``recipe`` and ``seed`` of the model, ``model/*`` to start from, ``num_epochs``.
        """
        module = received(client, msg).build()
        start = msg.group("model")
        if start:
            load_state(module, start)
        return trained_upload(module, client, self.local, msg)

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Average the smallest model, send it, and again.

        Args:
            cohort: the clients.
            job: says which model each client owns; the one with the fewest numbers in it is trained.
        """
        spec = all_models(job)[0]
        is_common = not job.client_models
        # Weights that a model comes with are no part of its recipe: they travel once.
        state: State = {} if is_common else dict(spec.initial)
        for number in range(self.num_rounds):
            replies = self.ask_models(
                cohort,
                job,
                number,
                dict.fromkeys(cohort.client_ids, state),
                task=None if is_common else self.train_smallest,
                specs=None if is_common else dict.fromkeys(cohort.client_ids, replace(spec, initial={})),
            )
            state = fuse_uploads(replies.uploads(), Mean(), example_weights(replies))
        job.facts["num_values"] = sum(tensor.numel() for tensor in state.values())
        return Fused(model=Artifact.of(spec, state))
