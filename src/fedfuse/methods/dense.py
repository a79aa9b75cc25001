"""Data-free distillation of an ensemble by a generator."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional as F

from fedfuse.core.artifact import Artifact
from fedfuse.core.method import Job, register_method
from fedfuse.methods.distilling import DataFree, check_numbers, note_statistics
from fedfuse.ops.distillation import disagreement, kd_divergence
from fedfuse.training.distillation import Distillation
from fedfuse.training.synthesis import Draft, Synthesis
from fedfuse.training.teachers import Teachers


@register_method("dense", paper="https://arxiv.org/abs/2112.12371", reference="Zhang et al., NeurIPS 2022")
@dataclass(frozen=True, kw_only=True)
class Dense(DataFree):
    """A generator makes images that the ensemble knows and on which the student disagrees; the student learns them.

    Zhang et al., NeurIPS 2022, algorithm 1 and equations 2 to 6.

    Exchanges: one, ``local_models``.

    Departures: the BatchNorm term sees every client's statistics (in the official code it is always 0); the last
    student is taken, not the best on the test set; a pass may be limited by ``distillation.num_batches``.

    Args:
        local: how clients train.
        student: ``{family: ..., its settings}``; the common model if left out.
        distillation: how the student learns.
        synthesis: how images are made.
        batchnorm_weight: lambda 1 in the paper, of the distance to BatchNorm statistics, 0 or more.
        adversarial_weight: lambda 2 in the paper, of the disagreement between student and ensemble, 0 or more.
        adversarial_temperature: of that term, above 0.
    """

    distillation: Distillation = field(
        default_factory=lambda: Distillation(batch_size=256, learning_rate=0.005, kd_temperature=20.0)
    )
    synthesis: Synthesis = field(default_factory=lambda: Synthesis(batch_size=256))
    batchnorm_weight: float = 1.0
    adversarial_weight: float = 1.0
    adversarial_temperature: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self, at_least_0=("batchnorm_weight", "adversarial_weight"), above_0=("adversarial_temperature",))

    def distil(self, teachers: Teachers, job: Job) -> Artifact:
        """Make images, teach the student, and again.

        Args:
            teachers: the clients' models.
            job: the common model, the server's random source.
        """
        studio = self.studio(teachers, job)
        watch = note_statistics(teachers, job, self.batchnorm_weight)

        def objective(draft: Draft) -> Tensor:
            known = teachers.mix(draft.logits)
            loss = F.cross_entropy(known, draft.labels)  # equation 2
            loss = loss + self.batchnorm_weight * draft.distance  # equation 3
            guess = studio.guess(draft.x)
            gap = kd_divergence(guess, known, self.adversarial_temperature)
            return loss - self.adversarial_weight * (disagreement(guess, known) * gap).mean()  # equation 4

        for _ in studio.epochs():
            studio.pool.add(*studio.make(objective, watch=watch))
            studio.teach()
        return self.shown(studio, job)
