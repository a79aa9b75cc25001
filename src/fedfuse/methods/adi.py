"""Inputs that are optimised themselves, and compete for what the student does not know."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional as F

from fedfuse.core.artifact import Artifact
from fedfuse.core.method import Job, register_method
from fedfuse.methods.distilling import DataFree, check_numbers, note_statistics
from fedfuse.models.generator import Pixels
from fedfuse.ops.distillation import jensen_shannon, total_variation
from fedfuse.training.distillation import Distillation
from fedfuse.training.synthesis import Draft, Synthesis
from fedfuse.training.teachers import Teachers


@register_method("adi", paper="https://arxiv.org/abs/1912.08795", reference="Yin et al., CVPR 2020")
@dataclass(frozen=True, kw_only=True)
class ADI(DataFree):
    """Noise turns into inputs that the models' BatchNorm layers take for real ones; a student learns them.

    Yin et al., CVPR 2020, DeepInversion (section 3.2) with adaptive competition (section 3.3), and the ensemble of the
    clients' models as the teacher.

    Exchanges: one, ``local_models``.

    Departures: the paper's teacher is one network: logits, and distances to BatchNorm statistics, are averaged over
    clients; the image priors are means over pixels, so that their weights do not hang on size and number of images;
    views are augmented as the clients' training is, where the official code shifts and mirrors; batches are made in
    turn with lessons, so that competition meets a student that knows the batches before.

    Args:
        local: how clients train.
        student: ``{family: ..., its settings}``; the common model if left out.
        distillation: how the student learns.
        synthesis: how inputs are made; ``latent_size`` and ``width`` have no meaning here.
        batchnorm_weight: alpha f in the paper, of the distance to BatchNorm statistics, 0 or more.
        variation_weight: alpha tv in the paper, of differences between neighbouring pixels, 0 or more.
        square_weight: alpha l2 in the paper, of large values, 0 or more.
        competition_weight: alpha c in the paper, of student and ensemble saying different things, 0 or more.
        competition_temperature: of that term, above 0.
    """

    distillation: Distillation = field(default_factory=lambda: Distillation(kd_temperature=4.0))
    synthesis: Synthesis = field(
        default_factory=lambda: Synthesis(num_epochs=50, num_steps=150, learning_rate=0.05, latent_size=1)
    )
    batchnorm_weight: float = 1.0
    variation_weight: float = 0.1
    square_weight: float = 1e-3
    competition_weight: float = 1.0
    competition_temperature: float = 3.0

    def __post_init__(self) -> None:
        check_numbers(
            self,
            at_least_0=("batchnorm_weight", "variation_weight", "square_weight", "competition_weight"),
            above_0=("competition_temperature",),
        )

    def distil(self, teachers: Teachers, job: Job) -> Artifact:
        """Optimise inputs, teach the student, and again.

        Args:
            teachers: the clients' models.
            job: the common model, the server's random source.
        """
        pixels = Pixels(self.synthesis.batch_size, job.model.input_shape, is_pixels=job.inputs.is_pixels)
        studio = self.studio(teachers, job, source=pixels)
        watch = note_statistics(teachers, job, self.batchnorm_weight)

        def objective(draft: Draft) -> Tensor:
            known = teachers.mix(draft.logits)
            loss = F.cross_entropy(known, draft.labels) + self.batchnorm_weight * draft.distance
            if draft.x.ndim == 4:
                loss = loss + self.variation_weight * total_variation(draft.x)
            loss = loss + self.square_weight * draft.x.square().mean()
            if self.competition_weight:
                gap = jensen_shannon(studio.guess(draft.x), known, self.competition_temperature).mean()
                loss = loss - self.competition_weight * gap
            return loss

        for _ in studio.epochs():
            studio.pool.add(*studio.make(objective, watch=watch))
            studio.teach()
        return self.shown(studio, job)
