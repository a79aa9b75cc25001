"""Training on all data in one place: the upper bound."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fedfuse.core.artifact import Artifact, detached_state
from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort
from fedfuse.core.examples import Examples
from fedfuse.core.expecting import TensorSpec
from fedfuse.core.method import Fused, Job, Method, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.training import LocalSGD, train


@register_method("centralized", reference="baseline: no privacy")
@dataclass(frozen=True, kw_only=True)
class Centralized(Method):
    """Training on all clients' data in one place: the upper bound, and what federation is there to avoid.

    Exchanges: one, ``raw_data``, which uploads the **raw training data**. It is declared, counted and shown like any
    upload; never use this method where data must not leave.

    Departures: none.

    Args:
        local: how the server trains; the same number of epochs over the pooled data as clients train over theirs.
    """

    local: LocalSGD = field(default_factory=LocalSGD)

    @client_task(
        uploads={"data/x": "the raw inputs", "data/y": "the labels", "augment": "name of the augmentation"}, settings=()
    )
    def raw_data(self, client: Client, msg: Payload) -> Payload:
        """Upload the training data.

        Args:
            client: the client.
            msg: empty.
        """
        train_part = client.data.train
        return Payload({"data/x": train_part.x, "data/y": train_part.y, "augment": client.data.augment})

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Pool the data and train.

        Args:
            cohort: the clients.
            job: model and random source.
        """
        shape = (None, *job.model.input_shape)
        expect = {"data/x": TensorSpec(shape), "data/y": TensorSpec((None,), torch.int64), "augment": str}
        replies = cohort.ask(self.raw_data, key="raw_data", expect=expect)
        parts = [replies[client_id] for client_id in replies]
        pooled = Examples(
            torch.cat([p.tensor("data/x") for p in parts]), torch.cat([p.tensor("data/y") for p in parts])
        )
        module = job.model.build()
        with job.rng.ambient("centralized"):
            curves = train(
                module,
                pooled,
                self.local,
                rng=job.rng.child("centralized"),
                device=job.device,
                augment=parts[0].text("augment"),
                progress=lambda done, total: job.progress("training on all data", done, total),
            )
        job.facts["train_loss"] = curves["train_loss"][-1].item()
        return Fused(model=Artifact.of(job.model, detached_state(module)))
