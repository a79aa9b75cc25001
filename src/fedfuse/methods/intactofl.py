"""The clients' models stay whole, and a trained gate weighs them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from fedfuse.core.artifact import Artifact, detached_state
from fedfuse.core.cohort import Cohort
from fedfuse.core.errors import ConfigError
from fedfuse.core.method import Fused, Job, register_method
from fedfuse.methods.distilling import (
    check_makes_inputs,
    check_numbers,
    client_teachers,
    latest_inputs,
    note_statistics,
    open_studio,
    show_inputs,
)
from fedfuse.methods.tasks import LocalTraining
from fedfuse.models.mixture import Gate, Mixture, mixed_logits
from fedfuse.ops.distillation import disagreement, kd_divergence
from fedfuse.training.distillation import Distillation, Learner
from fedfuse.training.synthesis import Draft, Synthesis
from fedfuse.training.teachers import Teachers


@register_method(
    "intactofl", paper="https://openreview.net/forum?id=C7gSh5Y2bI", reference="Zeng et al., ACM Multimedia 2024"
)
@dataclass(frozen=True, kw_only=True)
class IntactOFL(LocalTraining):
    """A mixture of the clients' models, whose gate learns on made inputs.

    Zeng et al., One-shot-but-not-degraded Federated Learning, ACM Multimedia 2024.

    Exchanges: one, ``local_models``.

    Departures: the result is the mixture (the official code returns the uniform ensemble, and reports the mixture's
    best accuracy on the test set); the gate begins as the uniform ensemble, not at random; the step that makes inputs
    harder is 8/255 of a pixel's range (the official code steps by 8, which leaves nothing of an image); with
    ``top_k`` below the number of clients, logits are divided by ``top_k``.

    Args:
        local: how clients train.
        distillation: how the gate learns; its ``kd_temperature`` is that of the term that holds it to the ensemble.
        synthesis: how inputs are made.
        top_fraction: of the clients' models that count for an input, in (0, 1]; rounded up.
        batchnorm_weight: of the distance to BatchNorm statistics, 0 or more.
        adversarial_weight: of the disagreement between mixture and uniform ensemble, 0 or more.
        adversarial_temperature: of that term, above 0.
        spread_weight: of the standard deviation of the gate's weights, 0 or more.
        ensemble_weight: of the divergence from the uniform ensemble, 0 or more.
        perturbation: the step that makes inputs harder for the gate's lesson, 0 or more; of pixels in [0, 1], or of
            normalised features.
    """

    distillation: Distillation = field(
        default_factory=lambda: Distillation(
            weight_decay=1e-4, schedule="cosine", kd_temperature=4.0, grad_clip_norm=10.0
        )
    )
    synthesis: Synthesis = field(default_factory=lambda: Synthesis(grad_clip_norm=10.0))
    top_fraction: float = 1.0
    batchnorm_weight: float = 1.0
    adversarial_weight: float = 1.0
    adversarial_temperature: float = 3.0
    spread_weight: float = 0.01
    ensemble_weight: float = 1.0
    perturbation: float = 8 / 255

    def __post_init__(self) -> None:
        weights = ("batchnorm_weight", "adversarial_weight", "spread_weight", "ensemble_weight", "perturbation")
        check_numbers(self, at_least_0=weights, above_0=("adversarial_temperature",))
        if not 0 < self.top_fraction <= 1:
            raise ConfigError(
                f"top_fraction is {self.top_fraction}", where="method.top_fraction", fix="give a number in (0, 1]"
            )

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Collect the models, make inputs, and train the gate on them.

        Args:
            cohort: the clients.
            job: says which model each client owns.
        """
        check_makes_inputs(job)
        teachers = client_teachers(self.local_models(cohort, job), job)
        num_experts = len(teachers.models)
        gate = Gate(math.prod(job.model.input_shape), num_experts, math.ceil(self.top_fraction * num_experts - 1e-9))
        self._train(gate, teachers, job)
        net = Mixture(teachers.models, gate, recipes=teachers.recipes)
        return Fused(
            model=Artifact(net.recipe, detached_state(net), template=net.cpu() if teachers.is_opaque else None)
        )

    def _train(self, gate: Gate, teachers: Teachers, job: Job) -> None:
        studio = open_studio(self.name, self.synthesis, Learner(gate, self.distillation, job.device), teachers, job)
        watch = note_statistics(teachers, job, self.batchnorm_weight)

        def objective(draft: Draft) -> Tensor:
            mixture = mixed_logits(studio.guess(draft.x), draft.logits, gate.top_k)
            ensemble = teachers.mix(draft.logits)
            loss = F.cross_entropy(mixture, draft.labels) + self.batchnorm_weight * draft.distance
            gap = disagreement(ensemble, mixture) * kd_divergence(ensemble, mixture, self.adversarial_temperature)
            return loss - self.adversarial_weight * gap.mean()

        def lesson(draft: Draft) -> Tensor:
            weights = gate(draft.x)
            mixture, ensemble = mixed_logits(weights, draft.logits, gate.top_k), teachers.mix(draft.logits)
            loss = F.cross_entropy(mixture, draft.labels)
            if weights.numel() > 1:
                loss = loss + self.spread_weight * _spread(weights)
            gap = kd_divergence(mixture, ensemble, self.distillation.kd_temperature).mean()
            return loss + self.ensemble_weight * gap

        def harder(x: Tensor, draw: torch.Generator) -> Tensor:
            return studio.harder(x, draw, self.perturbation)

        for _ in studio.epochs():
            studio.pool.add(*studio.make(objective, watch=watch))
            studio.teach(lesson=lesson, perturb=harder if self.perturbation else None)
        show_inputs(self.name, latest_inputs(studio), job)


def _spread(weights: Tensor) -> Tensor:
    """Standard deviation of all weights of a batch; the plain one has no gradient where all are equal."""
    variance = weights.var()
    return torch.where(variance > 0, variance.clamp(min=1e-12).sqrt(), torch.zeros_like(variance))
