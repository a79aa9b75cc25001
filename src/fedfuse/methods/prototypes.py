"""Nearest class mean, and Gaussian naive Bayes, on frozen features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort
from fedfuse.core.errors import ConfigError
from fedfuse.core.expecting import Expectation, TensorSpec
from fedfuse.core.method import Fused, Job, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.methods.frozen import HeadOnly
from fedfuse.methods.heads import linear
from fedfuse.models.headed import DiagonalGaussians
from fedfuse.ops.mixtures import DiagonalMoments, diagonal_moments, pool_diagonal

PrototypeKind = Literal["euclidean", "cosine", "naive_bayes"]


@register_method("prototypes", reference="baseline")
@dataclass(frozen=True, kw_only=True)
class Prototypes(HeadOnly):
    """The nearest class mean of frozen features; exactly that of the pooled data.

    Exchanges: one, ``prototypes``: the server names the features; every client uploads the number and the mean of each
    class, and for naive Bayes the squared deviations of every feature. No upload of this family is smaller.

    Departures: a textbook method. Cosines are taken around the mean of all examples, because features that are never
    negative all point one way.

    Args:
        backbone: the features.
        kind: what nearest means: ``euclidean`` distance; ``cosine`` of the angle around the common mean;
            ``naive_bayes``: likelihood under one Gaussian per class with independent features, times the frequency of
            the class.
        variance_floor: of naive Bayes: part of the largest variance of a feature that is added to all, above 0.
    """

    sums: ClassVar[Mapping[str, Mapping[str, str]]] = {
        # Squared deviations are from each client's own means: those of naive Bayes do not add up.
        "prototypes": {"prototypes/counts": "", "prototypes/means": "prototypes/counts"}
    }

    kind: PrototypeKind = "euclidean"
    variance_floor: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.variance_floor < float("inf"):
            raise ConfigError(
                f"variance_floor is {self.variance_floor}", where="method.variance_floor", fix="give a number above 0"
            )

    @client_task(
        uploads={
            "prototypes/counts": "examples per class",
            "prototypes/means": "mean feature vector per class",
            "prototypes/squares": "squared deviations of each feature from its class's mean, summed over examples",
        },
        settings=("backbone", "kind"),
    )
    def prototypes(self, client: Client, msg: Payload) -> Payload:
        """Class means of the features on the client's data.

        Args:
            client: the client.
            msg: ``backbone/*``: which features.
        """
        moments = diagonal_moments(self.features_at(client, msg), client.data.train.y, client.data.num_classes)
        upload = Payload({"prototypes/counts": moments.counts.long(), "prototypes/means": moments.means.float()})
        if self.kind == "naive_bayes":
            upload["prototypes/squares"] = moments.squares.float()
        return upload

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Pool the means and write down the head.

        Args:
            cohort: the clients.
            job: the common model.
        """
        message = self.backbone.message(job)
        features = self.backbone.build(job.model, message)
        num_classes = job.model.num_classes
        names = ("means", "squares") if self.kind == "naive_bayes" else ("means",)
        expect: Expectation = {
            "prototypes/counts": TensorSpec((num_classes,), torch.int64),
            **{f"prototypes/{name}": TensorSpec((num_classes, features.width)) for name in names},
        }
        replies = cohort.ask(self.prototypes, message, key="prototypes", expect=expect)
        moments = pool_diagonal([read_prototypes(replies[client_id]) for client_id in replies])
        if self.kind == "naive_bayes":
            return Fused(model=features.artifact(naive_bayes_head(moments, self.variance_floor)))
        return Fused(model=features.artifact(nearest_mean_head(moments, cosine=self.kind == "cosine")))


def read_prototypes(upload: Payload) -> DiagonalMoments:
    """Turn an upload of class means back into moments.

    Args:
        upload: already checked; without squares they count as zero.

    Returns:
        Moments in float64.
    """
    means = upload.tensor("prototypes/means").double()
    squares = (
        upload.tensor("prototypes/squares").double() if "prototypes/squares" in upload else torch.zeros_like(means)
    )
    return DiagonalMoments(upload.tensor("prototypes/counts").double(), means, squares)


def nearest_mean_head(moments: DiagonalMoments, *, cosine: bool) -> nn.Linear:
    """The linear head whose largest output is the nearest class mean.

    Args:
        moments: pooled.
        cosine: by the angle around the mean of all examples, not by the distance.

    Returns:
        For distances, half the negative squared distance up to a part that all classes share; for angles, the length
        of the projection on each mean's direction. A class without an example never wins.
    """
    center = (moments.counts[:, None] * moments.means).sum(0) / moments.counts.sum()
    offsets = moments.means - center
    if cosine:
        weights = offsets / offsets.norm(dim=1, keepdim=True).clamp(min=1e-12)
        biases = -(weights @ center)
    else:
        weights = offsets
        biases = -0.5 * offsets.square().sum(1) - weights @ center
    is_seen = moments.counts > 0
    lowest = torch.full_like(biases, torch.finfo(torch.float32).min / 4)
    return linear(weights * is_seen[:, None], torch.where(is_seen, biases, lowest))


def naive_bayes_head(moments: DiagonalMoments, variance_floor: float) -> DiagonalGaussians:
    """One Gaussian with independent features per class.

    Args:
        moments: pooled, with squares.
        variance_floor: part of the largest variance of a feature over all examples that is added to every variance.

    Returns:
        Joint log likelihoods; a class without an example never wins.
    """
    counts, total = moments.counts, moments.counts.sum()
    head = DiagonalGaussians(moments.means.shape[1], len(counts))
    center = (counts[:, None] * moments.means).sum(0) / total
    between = (counts[:, None] * (moments.means - center).square()).sum(0)
    overall = (moments.squares.sum(0) + between) / total
    variances = moments.squares / counts.clamp(min=1)[:, None] + variance_floor * float(overall.max()) + 1e-12
    is_seen = counts > 0
    lowest = torch.full_like(counts, torch.finfo(torch.float32).min / 4)
    head.center.copy_(center)
    head.means.copy_(torch.where(is_seen[:, None], moments.means, center))
    head.precisions.copy_(torch.where(is_seen[:, None], 1 / variances, torch.ones_like(variances)))
    head.log_priors.copy_(torch.where(is_seen, (counts.clamp(min=1) / total).log(), lowest))
    return head
