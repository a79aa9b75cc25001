"""Federated averaging of nested models: every client trains a part of the largest one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedfuse.core.artifact import Artifact
from fedfuse.core.cohort import Cohort, Replies
from fedfuse.core.method import Fused, Job, register_method
from fedfuse.methods.rounds import first_weights
from fedfuse.methods.sizes import OwnSizes, State, all_models
from fedfuse.methods.tasks import example_weights
from fedfuse.models.nesting import Nest, nest_of, shapes_of
from fedfuse.ops.slices import mean_where_held


@register_method("heterofl", paper="https://arxiv.org/abs/2010.01264", reference="Diao et al., ICLR 2021")
@dataclass(frozen=True, kw_only=True)
class HeteroFL(OwnSizes):
    """Every client trains the first channels of the largest model; each number is averaged over those who hold it.

    Diao et al., ICLR 2021, algorithm 1 and equation 2.

    Exchanges: ``num_rounds``; each uploads the client's whole model, a part of the largest. With one round and equal
    models this is FedAvg, and asks its question.

    Departures: the mean is weighted by examples. Activations are not scaled by the width, and logits of classes that a
    client lacks are not masked. BatchNorm's running statistics are averaged like weights, where the paper has none
    while it trains and asks the clients for them at the end. A client's model may also lack whole layers of the
    largest; of weights in which queries, keys and values are joined it holds a part of each.

    Args:
        local: how clients train; ``local.num_epochs`` is the total over all rounds.
        num_rounds: rounds, at least 1.
    """

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Cut out every client's part, let it train, put the parts together, and again.

        Args:
            cohort: the clients.
            job: says which model each client owns; all must be parts of the largest.
        """
        specs = all_models(job)
        nest = nest_of(specs)
        shapes = {spec.digest: shapes_of(spec.build()) for spec in specs}
        owned = {client_id: job.model_of(client_id).digest for client_id in cohort.client_ids}
        whole, largest = first_weights(nest.spec), nest.spec.digest
        parts: dict[str, State] = {}
        for number in range(self.num_rounds):
            parts = {digest: nest.part(whole, held) for digest, held in shapes.items()}
            # In the first round, who owns the largest model has these weights already.
            starts = {c: parts[digest] for c, digest in owned.items() if number or digest != largest}
            whole = put_together(whole, self.ask_models(cohort, job, number, starts), nest)
        if len(specs) == 1:
            return Fused(model=Artifact.of(job.model, whole))
        parts = {digest: nest.part(whole, held) for digest, held in shapes.items()}
        return Fused(personal={c: Artifact.of(job.model_of(c), parts[digest]) for c, digest in owned.items()})


def put_together(whole: State, replies: Replies, nest: Nest) -> dict[str, Tensor]:
    """The largest model from its parts, read one tensor at a time.

    Args:
        whole: the largest model as it was.
        replies: uploads with ``model/*``, each a part, and ``num_examples``.
        nest: what parts look like.
    """
    weights, uploads = example_weights(replies), replies.uploads()
    found = {}
    for name, tensor in whole.items():
        parts, counts = [], []
        for weight, upload in zip(weights, uploads, strict=True):
            part = upload.get(f"model/{name}")
            if isinstance(part, Tensor):
                parts.append(part)
                counts.append(weight)
        found[name] = mean_where_held(tensor, parts, counts, nest.packs.get(name, {}))
    return found
