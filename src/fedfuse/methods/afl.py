"""Analytic federated learning: ridge regression on frozen features, exact for any partition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort
from fedfuse.core.errors import ConfigError
from fedfuse.core.expecting import TensorSpec
from fedfuse.core.method import Fused, Job, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.methods.frozen import HeadOnly
from fedfuse.methods.heads import linear
from fedfuse.ops.moments import pack_symmetric, unpack_symmetric
from fedfuse.ops.ridge import GramSums, add_up, gram_sums, solve_ridge

GRAM_UPLOADS = {
    "sums/gram": "products of all pairs of features, summed over examples; the sums of the features; their number",
    "sums/targets": "features summed over the examples of each class; examples per class",
}


@register_method("afl", paper="https://arxiv.org/abs/2405.16240", reference="He et al., CVPR 2025")
@dataclass(frozen=True, kw_only=True)
class AFL(HeadOnly):
    """Ridge regression on frozen features, solved once from sums over all clients' examples.

    He et al., CVPR 2025: the result is that of the pooled data, whatever the partition, however many clients, in any
    order; a client that comes late is added and one that leaves is subtracted, exactly.

    Exchanges: one, ``gram``: the server names the features; every client uploads sums over its examples, which grow
    with the square of the features' width and not with the examples.

    Departures: clients upload X^T X and X^T Y instead of their own solutions and two matrices more; the sums lead to
    the same joint solution with one inversion, need no penalty at the client, and keep their precision with many small
    clients. There is a bias, which bears no penalty. The penalty is chosen by generalised cross-validation from the
    same sums. Features may be random, where no pre-trained model is at hand.

    Args:
        backbone: the features.
        ridge: penalty relative to the mean variance of a feature times the number of examples (gamma in the paper is
            absolute), 0 or more; ``None`` chooses it from the sums by generalised cross-validation.
        precision: of the uploaded sums; ``float32`` halves the bytes.
    """

    sums: ClassVar[Mapping[str, Mapping[str, str]]] = {"gram": dict.fromkeys(GRAM_UPLOADS, "")}

    ridge: float | None = None
    precision: Literal["float64", "float32"] = "float64"

    def __post_init__(self) -> None:
        if self.ridge is not None and not 0 <= self.ridge < float("inf"):
            raise ConfigError(
                f"ridge is {self.ridge}", where="method.ridge", fix="give 0 or more, or leave it out to choose it"
            )

    @property
    def dtype(self) -> torch.dtype:
        """What the sums travel as."""
        return torch.float64 if self.precision == "float64" else torch.float32

    @client_task(uploads=GRAM_UPLOADS, settings=("backbone", "precision"))
    def gram(self, client: Client, msg: Payload) -> Payload:
        """Sum up the client's examples.

        Args:
            client: the client.
            msg: ``backbone/*``: which features.
        """
        sums = gram_sums(self.features_at(client, msg), client.data.train.y, client.data.num_classes)
        dtype = self.dtype
        return Payload({"sums/gram": pack_symmetric(sums.gram).to(dtype), "sums/targets": sums.targets.to(dtype)})

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Add up and solve.

        Args:
            cohort: the clients.
            job: the common model.
        """
        message = self.backbone.message(job)
        features = self.backbone.build(job.model, message)
        side = features.width + 1
        expect = {
            "sums/gram": TensorSpec((side * (side + 1) // 2,), self.dtype),
            "sums/targets": TensorSpec((side, job.model.num_classes), self.dtype),
        }
        replies = cohort.ask(self.gram, message, key="gram", expect=expect)
        solution = solve_ridge(add_up(read_sums(replies[client_id], side) for client_id in replies), self.ridge)
        job.facts["ridge"] = solution.ridge
        return Fused(model=features.artifact(linear(solution.weights, solution.biases)))


def read_sums(upload: Payload, side: int) -> GramSums:
    """Turn an upload of :data:`GRAM_UPLOADS` back into sums.

    Args:
        upload: already checked.
        side: width of the features, and one for the bias.

    Returns:
        Sums in float64.
    """
    gram = unpack_symmetric(upload.tensor("sums/gram").double(), side)
    return GramSums(gram, upload.tensor("sums/targets").double())
