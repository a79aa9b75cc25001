"""Mixtures of Gaussians of frozen features, from which the server draws what it trains a head on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort
from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.expecting import Expectation, TensorSpec
from fedfuse.core.method import Fused, Job, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.core.seeding import Rng, derive_seed
from fedfuse.methods.frozen import HeadOnly, HeadTraining, trained_head
from fedfuse.ops.mixtures import CovarianceKind, Mixture, covariance_size, draw_mixture, fit_mixture

DTYPES: Mapping[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
_MAX_DRAWS = 10_000_000
"""More examples than this nobody has who uploads statistics of small features."""

_MIXTURE_UPLOADS = {
    "mixtures/counts": "examples per class",
    "mixtures/weights": "share of each component of a class's mixture",
    "mixtures/means": "mean feature vector of each component",
    "mixtures/covariances": "spread of the features around it",
}


@register_method("fedpft", paper="https://arxiv.org/abs/2402.01862", reference="Beitollahi et al., TMLR 2025")
@dataclass(frozen=True, kw_only=True)
class FedPFT(HeadOnly):
    """One mixture of Gaussians per client and class of frozen features; the server draws from them and trains a head.

    Beitollahi et al., 2024, algorithm 1, centralised form.

    Exchanges: one, ``mixtures``: the server names the features; every client uploads the mixtures of its classes.

    Departures: one component is fitted in closed form, not by expectation maximisation, and a class with fewer
    examples than components gets as many components as examples instead of being dropped. The head is trained by SGD
    on standardised features. No noise for differential privacy yet.

    Args:
        backbone: the features.
        num_mixtures: components per class, at least 1 (K in the paper).
        covariance: of a component: ``spherical`` is one number, ``diagonal`` one per feature, ``full`` a matrix.
        precision: of the upload.
        num_draws: features per client and class that the server draws; ``None`` draws as many as the client has
            examples of the class.
        head_training: how the server trains the head.
    """

    num_mixtures: int = 1
    covariance: CovarianceKind = "diagonal"
    precision: Literal["float16", "bfloat16", "float32"] = "float16"
    num_draws: int | None = None
    head_training: HeadTraining = field(default_factory=HeadTraining)

    def __post_init__(self) -> None:
        for name in ("num_mixtures", "num_draws"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}", where=f"method.{name}", fix="give at least 1")

    @client_task(uploads=_MIXTURE_UPLOADS, settings=("backbone", "num_mixtures", "covariance", "precision"))
    def mixtures(self, client: Client, msg: Payload) -> Payload:
        """Fit a mixture to the features of each class that the client has.

        Args:
            client: the client.
            msg: ``backbone/*``: which features.

        Raises:
            DataError: the features are too large for the precision of the upload.
        """
        features, y, num_classes = self.features_at(client, msg), client.data.train.y, client.data.num_classes
        counts = torch.bincount(y, minlength=num_classes)
        parts = empty_mixtures(num_classes, self.num_mixtures, features.shape[1], self.covariance)
        for done, c in enumerate(counts.nonzero().flatten().tolist()):
            seed = derive_seed(client.rng.seed, "mixture", c)
            found = fit_mixture(features[y == c], self.num_mixtures, self.covariance, seed=seed)
            for name, tensor in parts.items():
                tensor[c] = getattr(found, name)
            client.progress(done + 1, int((counts > 0).sum()))
        upload = Payload({"mixtures/counts": counts})
        for name, tensor in parts.items():
            rounded = tensor.to(DTYPES[self.precision])
            if not bool(torch.isfinite(rounded.float()).all()):
                raise DataError(
                    f"the features are too large for {self.precision}",
                    where=f"client {client.id}, mixtures/{name}",
                    fix="use method.precision: bfloat16 or float32",
                )
            upload[f"mixtures/{name}"] = rounded
        return upload

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Draw from all mixtures and train the head.

        Args:
            cohort: the clients.
            job: the common model, and the random source of the draws.
        """
        message = self.backbone.message(job)
        frozen = self.backbone.build(job.model, message)
        num_classes, dtype = job.model.num_classes, DTYPES[self.precision]
        parts = empty_mixtures(num_classes, self.num_mixtures, frozen.width, self.covariance)
        expect: Expectation = {
            "mixtures/counts": TensorSpec((num_classes,), torch.int64),
            **{f"mixtures/{name}": TensorSpec(tuple(tensor.shape), dtype) for name, tensor in parts.items()},
        }
        replies = cohort.ask(self.mixtures, message, key="mixtures", expect=expect)
        features: list[Tensor] = []
        labels: list[Tensor] = []
        for client_id in replies:
            upload = replies[client_id]
            _check_draws(client_id, upload)
            x, y = self._draws(upload, job.rng.child("draws", client_id))
            features.append(x)
            labels.append(y)
        head = trained_head(torch.cat(features), torch.cat(labels), num_classes, self.head_training, job)
        return Fused(model=frozen.artifact(head))

    def _draws(self, upload: Payload, rng: Rng) -> tuple[Tensor, Tensor]:
        """Virtual features and labels of one client; nobody else's draws depend on it."""
        counts = upload.tensor("mixtures/counts")
        parts = {name: upload.tensor(f"mixtures/{name}") for name in ("weights", "means", "covariances")}
        features: list[Tensor] = []
        labels: list[Tensor] = []
        for c in counts.nonzero().flatten().tolist():
            num_draws = int(counts[c]) if self.num_draws is None else self.num_draws
            mixture = Mixture(**{name: tensor[c] for name, tensor in parts.items()})
            features.append(draw_mixture(mixture, num_draws, self.covariance, rng.torch(c)))
            labels.append(torch.full((num_draws,), c, dtype=torch.int64))
        return torch.cat(features), torch.cat(labels)


def _check_draws(client_id: str, upload: Payload) -> None:
    """Refuse what nobody can draw from, or only with all of the server's memory."""
    counts, weights = upload.tensor("mixtures/counts"), upload.tensor("mixtures/weights")
    present = weights[counts > 0]
    reason = ""
    if bool((counts < 0).any()) or int(counts.sum()) > _MAX_DRAWS:
        reason = f"it claims {int(counts.min()):,} to {int(counts.max()):,} examples of a class"
    elif bool((present < 0).any()) or not bool((present.sum(1) > 0).all()):
        reason = "shares of its mixtures are negative or zero"
    if reason:
        raise DataError(reason, where=f"client {client_id}", fix="leave this client out")


def empty_mixtures(num_classes: int, num_mixtures: int, d: int, covariance: CovarianceKind) -> dict[str, Any]:
    """Zeros in the form of the mixtures of all classes.

    Args:
        num_classes: number of classes.
        num_mixtures: components of each.
        d: width of the features.
        covariance: what a component's covariance can express.

    Returns:
        ``weights``, ``means`` and ``covariances``, float64, classes first.
    """
    shapes = {"weights": (), "means": (d,), "covariances": covariance_size(covariance, d)}
    return {
        name: torch.zeros((num_classes, num_mixtures, *shape), dtype=torch.float64) for name, shape in shapes.items()
    }
