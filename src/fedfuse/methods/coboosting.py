"""Synthetic inputs and the ensemble's weights that make each other better."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fedfuse.core.artifact import Artifact
from fedfuse.core.errors import ConfigError
from fedfuse.core.method import Job, register_method
from fedfuse.methods.distilling import DataFree, check_numbers, note_statistics, weighted_ensemble
from fedfuse.ops.distillation import (
    boosted_weights,
    hard_sample_cross_entropy,
    kd_divergence,
)
from fedfuse.training.distillation import Distillation
from fedfuse.training.sgd import batches
from fedfuse.training.synthesis import Draft, Studio, Synthesis
from fedfuse.training.teachers import Teachers


@register_method("coboosting", paper="https://arxiv.org/abs/2402.15070", reference="Dai et al., ICLR 2024")
@dataclass(frozen=True, kw_only=True)
class CoBoosting(DataFree):
    """Hard inputs re-weigh the ensemble, and the better ensemble makes and labels harder inputs.

    Dai et al., ICLR 2024, algorithm 1.

    Exchanges: one, ``local_models``.

    Departures: the last student is taken, not the best on the test set; the perturbation of pixels is a step in
    [0, 1] that stays there, where the official code steps in normalised space; the weights are moved on the pool as it
    is, without augmentation, so that no answer of a client's model is computed twice.

    Args:
        local: how clients train.
        student: ``{family: ..., its settings}``; the common model if left out.
        distillation: how the student learns.
        synthesis: how inputs are made.
        hard_sample_power: of the weight ``1 - p`` of hard inputs, 0 or more; 0 is plain cross-entropy.
        adversarial_weight: beta in the paper, of the gap between student and ensemble, 0 or more.
        adversarial_temperature: of that term, above 0.
        batchnorm_weight: of the distance to BatchNorm statistics, 0 or more.
        weight_step: mu in the paper, the first step of the ensemble's weights, 0 or more; 0 keeps them equal.
        weight_decay_per_epoch: factor of that step from epoch to epoch, in (0, 1].
        perturbation: epsilon in the paper, the step that makes inputs harder for the student's lesson, 0 or more; of
            pixels in [0, 1], or of normalised features.
        result: ``student``, or ``ensemble``: the clients' models with the weights that were found.
    """

    distillation: Distillation = field(
        default_factory=lambda: Distillation(
            weight_decay=1e-4, schedule="cosine", kd_temperature=4.0, grad_clip_norm=10.0
        )
    )
    synthesis: Synthesis = field(default_factory=lambda: Synthesis(grad_clip_norm=10.0))
    hard_sample_power: float = 1.0
    adversarial_weight: float = 1.0
    adversarial_temperature: float = 3.0
    batchnorm_weight: float = 0.0
    weight_step: float = 0.01
    weight_decay_per_epoch: float = 0.99
    perturbation: float = 8 / 255
    result: Literal["student", "ensemble"] = "student"

    def __post_init__(self) -> None:
        check_numbers(
            self,
            at_least_0=(
                "hard_sample_power",
                "adversarial_weight",
                "batchnorm_weight",
                "weight_step",
                "perturbation",
            ),
            above_0=("adversarial_temperature",),
        )
        if not 0 < self.weight_decay_per_epoch <= 1:
            raise ConfigError(
                f"weight_decay_per_epoch is {self.weight_decay_per_epoch}",
                where="method.weight_decay_per_epoch",
                fix="give a number in (0, 1]",
            )

    def distil(self, teachers: Teachers, job: Job) -> Artifact:
        """Make hard inputs, re-weigh the ensemble, teach the student, and again.

        Args:
            teachers: the clients' models.
            job: the common model, the server's random source.
        """
        studio = self.studio(teachers, job)
        watch = note_statistics(teachers, job, self.batchnorm_weight)

        def objective(draft: Draft) -> Tensor:
            known = teachers.mix(draft.logits, studio.weights)
            loss = hard_sample_cross_entropy(known, draft.labels, self.hard_sample_power).mean()
            if self.adversarial_weight:
                gap = kd_divergence(studio.guess(draft.x), known, self.adversarial_temperature).mean()
                loss = loss - self.adversarial_weight * gap
            return loss + self.batchnorm_weight * draft.distance

        def harder(x: Tensor, draw: torch.Generator) -> Tensor:
            return studio.harder(x, draw, self.perturbation)

        for epoch in studio.epochs():
            made = studio.make(objective, watch=watch)
            self._boost(studio, epoch)
            studio.pool.add(*made)
            studio.teach(perturb=harder if self.perturbation else None)
        shares = (studio.weights / studio.weights.sum()).tolist()
        job.facts["ensemble_weights"] = [round(share, 6) for share in shares]
        student_artifact = self.shown(studio, job)
        return weighted_ensemble(teachers, studio.weights, job) if self.result == "ensemble" else student_artifact

    def _boost(self, studio: Studio, epoch: int) -> None:
        """One sweep of the ensemble's weights over what earlier epochs made."""
        if not len(studio.pool) or not self.weight_step:
            return
        answers, labels, start = studio.answers(), studio.pool.labels.to(studio.device), studio.weights
        step_size = self.weight_step * self.weight_decay_per_epoch**epoch
        order = studio.rng.child("boost", epoch).torch("order")
        for index in batches(len(labels), studio.learner.settings.batch_size, order):
            chosen = index.to(studio.device)
            studio.weights = boosted_weights(studio.weights, start, answers[:, chosen], labels[chosen], step_size)
