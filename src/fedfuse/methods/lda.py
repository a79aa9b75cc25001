"""Linear discriminant analysis of frozen features from pooled moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort
from fedfuse.core.errors import ConfigError
from fedfuse.core.method import Fused, Job, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.methods.frozen import HeadOnly
from fedfuse.methods.heads import linear
from fedfuse.methods.tasks import MOMENT_UPLOADS, moments_expectation, moments_upload, read_moments
from fedfuse.ops.moments import lda_head, pool


@register_method("lda", reference="Fisher, 1936")
@dataclass(frozen=True, kw_only=True)
class LDA(HeadOnly):
    """Linear discriminant analysis of frozen features, exactly that of the pooled data.

    Exchanges: one, ``moments``: the server names the features; every client uploads, of its examples, the number and
    the mean of each class and one scatter matrix around these means.

    Departures: a textbook method; that its moments can be pooled exactly is what makes it federated.

    Args:
        backbone: the features.
        shrinkage: of the covariance towards a scaled identity, in [0, 1]; ``None`` computes it from the moments by
            oracle approximating shrinkage.
        priors: ``pooled`` frequencies of the classes, or ``uniform``.
    """

    shrinkage: float | None = None
    priors: Literal["pooled", "uniform"] = "pooled"

    def __post_init__(self) -> None:
        if self.shrinkage is not None and not 0 <= self.shrinkage <= 1:
            raise ConfigError(
                f"shrinkage is {self.shrinkage}",
                where="method.shrinkage",
                fix="give a number in [0, 1], or leave it out",
            )

    @client_task(uploads=MOMENT_UPLOADS, settings=("backbone",))
    def moments(self, client: Client, msg: Payload) -> Payload:
        """Moments of the features on the client's data.

        Args:
            client: the client.
            msg: ``backbone/*``: which features.
        """
        return moments_upload(self.backbone.build(client.model, msg).module, client, per_class=False)

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Pool the moments and write down the head.

        Args:
            cohort: the clients.
            job: the common model.
        """
        message = self.backbone.message(job)
        features = self.backbone.build(job.model, message)
        expect = moments_expectation(job.model.num_classes, features.width, per_class=False)
        replies = cohort.ask(self.moments, message, key="moments", expect=expect)
        moments = pool(read_moments(replies[client_id]) for client_id in replies)
        head = linear(*lda_head(moments, shrinkage=self.shrinkage, priors=self.priors))
        return Fused(model=features.artifact(head))
