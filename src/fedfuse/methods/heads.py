"""Linear heads on the features of several columns: the same choices for every method that ends in one.

Measured on MNIST and CIFAR-10, the head decides more than the fusion below it; so that comparisons are fair it is a
factor of its own, with the same options everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedfuse.core.errors import ConfigError, ModelError
from fedfuse.core.examples import Examples
from fedfuse.core.method import Job
from fedfuse.ops.moments import Moments, gaussian_draws, lda_head
from fedfuse.training import LocalSGD, train

HeadKind = Literal["lda", "calibrated", "average", "ensemble"]
FeatureKind = Literal["auto", "mean", "concat"]

DIFFERENT_WIDTHS = "heads of different widths cannot be averaged"
OTHER_HEADS = "use head.kind: lda or ensemble for clients with different models"


@dataclass(frozen=True, kw_only=True)
class Head:
    """How the linear head over several columns is made.

    Args:
        kind: ``lda``: in closed form from the clients' pooled moments; ``calibrated``: the averaged heads, trained
            further on virtual features drawn from the pooled moments (CCVR); ``average``: the mean of the clients'
            heads; ``ensemble``: each client's head on its own column, logits averaged.
        features: what the head sees: the ``mean`` of the columns' features or their join, ``concat``. ``auto`` is
            ``concat`` for lda and ensemble, ``mean`` for the others.
        shrinkage: of LDA's covariance towards a scaled identity, in [0, 1]; ``None`` computes it from the moments.
        priors: of LDA: ``pooled`` frequencies of the classes, or ``uniform``.
        num_draws: virtual features per class for calibration.
        num_epochs: of calibration.
        learning_rate: of calibration.
        per_class: whether the moments of calibration keep one covariance per class; that is what CCVR sends, and
            num_classes times the bytes. LDA needs one for all classes.
    """

    kind: HeadKind = "lda"
    features: FeatureKind = "auto"
    shrinkage: float | None = None
    priors: Literal["pooled", "uniform"] = "pooled"
    num_draws: int = 2000
    num_epochs: int = 10
    learning_rate: float = 0.01
    per_class: bool = True

    def __post_init__(self) -> None:
        if self.shrinkage is not None and not 0 <= self.shrinkage <= 1:
            fix = "give a number in [0, 1], or leave it out"
            raise ConfigError(f"shrinkage is {self.shrinkage}", where="head.shrinkage", fix=fix)
        for name in ("num_draws", "num_epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", where=f"head.{name}", fix="give at least 1")
        if not self.learning_rate > 0:
            fix = "give a number above 0"
            raise ConfigError(f"learning_rate is {self.learning_rate}", where="head.learning_rate", fix=fix)
        wants = {"average": "mean", "ensemble": "concat"}.get(self.kind)
        if wants and self.features not in ("auto", wants):
            raise ConfigError(
                f"the head {self.kind} works on {wants} features",
                where="head.features",
                fix=f"use features: auto or {wants}",
            )

    @property
    def needs_moments(self) -> bool:
        """Whether clients must be asked for the moments of their features."""
        return self.kind in ("lda", "calibrated")

    @property
    def sends_per_class(self) -> bool:
        """Whether those moments keep one scatter per class."""
        return self.kind == "calibrated" and self.per_class

    @property
    def sees(self) -> str:
        """``mean`` or ``concat``."""
        if self.features != "auto":
            return self.features
        return "concat" if self.kind in ("lda", "ensemble") else "mean"

    def check(self, widths: Sequence[int]) -> None:
        """Refuse columns that this head cannot join.

        Args:
            widths: features of each column.

        Raises:
            ModelError: they differ, and the head averages them.
        """
        if self.sees == "mean" and len(set(widths)) > 1:
            if self.kind == "lda":
                raise ModelError(
                    "features of different widths cannot be averaged",
                    where="method.head",
                    fix="use head.features: concat",
                )
            raise ModelError(DIFFERENT_WIDTHS, fix=OTHER_HEADS)

    def make(self, heads: Sequence[nn.Linear], moments: Moments | None, job: Job) -> nn.Linear:
        """Make the head.

        Args:
            heads: the clients' own heads, in column order.
            moments: pooled moments of the features that the head sees; needed for lda and calibrated.
            job: random source and progress.

        Returns:
            A linear layer on those features.

        Raises:
            ModelError: heads of different widths cannot be averaged.
        """
        if self.kind == "lda":
            assert moments is not None
            return linear(*lda_head(moments, shrinkage=self.shrinkage, priors=self.priors))
        head = average_head(heads) if self.sees == "mean" else joint_head(heads)
        if self.kind == "calibrated":
            assert moments is not None
            self._calibrate(head, moments, job)
        return head

    def _calibrate(self, head: nn.Linear, moments: Moments, job: Job) -> None:
        features, labels = gaussian_draws(moments, self.num_draws, job.rng.torch("virtual features"))
        settings = LocalSGD(num_epochs=self.num_epochs, learning_rate=self.learning_rate, batch_size=128)
        train(
            head,
            Examples(features, labels),
            settings,
            rng=job.rng.child("calibration"),
            device=job.device,
            progress=lambda done, total: job.progress("calibrating the head", done, total),
        )


def linear(weights: Tensor, biases: Tensor) -> nn.Linear:
    """A linear layer with given parameters.

    Args:
        weights: shape ``(num_classes, d)``.
        biases: shape ``(num_classes,)``.
    """
    layer = nn.Linear(weights.shape[1], weights.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weights)
        layer.bias.copy_(biases)
    return layer


def average_head(heads: Sequence[nn.Linear]) -> nn.Linear:
    """The mean of several heads.

    Args:
        heads: all of the same shape.

    Returns:
        A head on the mean of the columns' features.

    Raises:
        ModelError: their widths differ.
    """
    if len({head.in_features for head in heads}) > 1:
        raise ModelError(
            DIFFERENT_WIDTHS,
            fix=OTHER_HEADS,
        )
    weights = torch.stack([head.weight.detach().double() for head in heads]).mean(0)
    return linear(weights, torch.stack([_bias(head) for head in heads]).mean(0))


def joint_head(heads: Sequence[nn.Linear]) -> nn.Linear:
    """One head on joined features that averages the logits of several heads, each on its own column.

    Args:
        heads: in column order.

    Returns:
        A head on the concatenation of the columns' features.
    """
    weights = torch.cat([head.weight.detach().double() for head in heads], 1) / len(heads)
    return linear(weights, torch.stack([_bias(head) for head in heads]).mean(0))


def _bias(head: nn.Linear) -> Tensor:
    return torch.zeros(head.out_features, dtype=torch.float64) if head.bias is None else head.bias.detach().double()
