"""Isolated models under one common head: fusion by the head alone."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field

from torch import nn

from fedfuse.core.artifact import Artifact, build, detached_state, load_state
from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort
from fedfuse.core.method import Fused, Job, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.methods.heads import Head
from fedfuse.methods.tasks import MOMENT_UPLOADS, LocalTraining, moments_expectation, moments_upload, read_moments
from fedfuse.models.blocks import cut_spec
from fedfuse.models.fused import Column, FusedBlocks, Level
from fedfuse.ops.moments import pool


@register_method("feature_ensemble", reference="fedfuse")
@dataclass(frozen=True, kw_only=True)
class FeatureEnsemble(LocalTraining):
    """The clients' isolated models side by side, and one linear head on all their features.

    What remains of FuseFL when nothing is fused below the head; the control that separates the gain of fused blocks
    from the gain of a head made with everybody's moments.

    Exchanges: ``local_models``; then, for the heads that need them, ``moments``: every client gets all models and
    uploads the moments of their features on its own data.

    Departures: a method of our own.

    Args:
        local: how clients train.
        head: how the head is made.
    """

    head: Head = field(default_factory=Head)

    @client_task(uploads=MOMENT_UPLOADS, settings=("head",))
    def feature_moments(self, client: Client, msg: Payload) -> Payload:
        """Moments of all models' features on the client's data.

        Args:
            client: the client.
            msg: ``net/*``; ``recipes`` where clients own different models.
        """
        recipes = json.loads(msg.text("recipes")) if "recipes" in msg else []
        own = cut_spec(client.model, 1).blocks[0]
        blocks = [build(recipe) if recipe else copy.deepcopy(own) for recipe in recipes]
        blocks = blocks or [copy.deepcopy(own) for _ in range(int(msg.number("num_columns")))]
        net = FusedBlocks([Level([Column(None, block) for block in blocks])], features=self.head.sees)
        load_state(net, msg.group("net"))
        return moments_upload(net, client, per_class=self.head.sends_per_class)

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Collect the models, make the head.

        Args:
            cohort: the clients.
            job: says which model each client owns.
        """
        specs = {client_id: job.model_of(client_id) for client_id in cohort.client_ids}
        self.head.check([cut_spec(spec, 1).head.in_features for spec in specs.values()])
        replies = self.local_models(cohort, job)
        blocks: list[nn.Module] = []
        heads: list[nn.Linear] = []
        recipes = []
        for client_id in replies:
            pieces = cut_spec(job.model_of(client_id), 1).copy()
            pieces.load_whole(replies[client_id].group("model"))
            blocks.append(pieces.blocks[0])
            heads.append(pieces.head)
            recipes.append(pieces.recipes[0])
        net = FusedBlocks(
            [Level([Column(None, block) for block in blocks])], features=self.head.sees, block_recipes=[recipes]
        )
        moments = None
        if self.head.needs_moments:
            message = Payload({"num_columns": len(blocks)}).put_group("net", detached_state(net))
            if job.client_models:
                message["recipes"] = json.dumps(recipes)
            width = sum(head.in_features for head in heads) if self.head.sees == "concat" else heads[0].in_features
            expect = moments_expectation(job.model.num_classes, width, per_class=self.head.sends_per_class)
            answers = cohort.ask(self.feature_moments, message, key="moments", expect=expect)
            moments = pool(read_moments(answers[client_id]) for client_id in answers)
        net.head = self.head.make(heads, moments, job)
        is_opaque = any(job.model_of(client_id).template is not None for client_id in replies)
        return Fused(model=Artifact(net.recipe, detached_state(net), template=net if is_opaque else None))
