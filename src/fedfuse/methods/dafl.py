"""A generator and a student that learn from the ensemble at the same time."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from fedfuse.core.artifact import Artifact, detached_state, load_state
from fedfuse.core.method import Job, register_method
from fedfuse.methods.distilling import DataFree, check_numbers, show_inputs
from fedfuse.ops.distillation import batch_information, mean_activation
from fedfuse.training.distillation import Distillation, check_loss, optimizer_memory, restore_optimizer
from fedfuse.training.synthesis import Studio, Synthesis
from fedfuse.training.teachers import Teachers

NO_FEATURES = "no client's model ends in a linear layer: inputs are made without the activation term"


@register_method("dafl", paper="https://arxiv.org/abs/1904.01186", reference="Chen et al., ICCV 2019")
@dataclass(frozen=True, kw_only=True)
class DAFL(DataFree):
    """A generator learns to make what the ensemble is sure of, of all classes alike; a student learns along with it.

    Chen et al., ICCV 2019, section 3, with the ensemble of the clients' models as the one teacher.

    Exchanges: one, ``local_models``.

    Departures: the paper's teacher is one network: logits are averaged over clients, and so is the activation term;
    that term is the mean over features, as in the official code, so that its weight does not hang on their number;
    entropy is in nats, where the official code takes a logarithm to base 10; the last student is taken, not the best
    on the test set.

    Args:
        local: how clients train.
        student: ``{family: ..., its settings}``; the common model if left out.
        distillation: how the student learns; its ``batch_size`` and ``num_batches`` have no meaning here, as every
            batch is new.
        synthesis: how inputs are made: ``num_epochs`` times ``num_steps`` steps of generator and student.
        one_hot_weight: of the ensemble's certainty, 0 or more.
        activation_weight: alpha in the paper, of large features, 0 or more.
        information_weight: beta in the paper, of classes in equal parts, 0 or more.
    """

    distillation: Distillation = field(default_factory=lambda: Distillation(kd_temperature=1.0))
    synthesis: Synthesis = field(default_factory=Synthesis)
    one_hot_weight: float = 1.0
    activation_weight: float = 0.1
    information_weight: float = 5.0

    def __post_init__(self) -> None:
        check_numbers(self, at_least_0=("one_hot_weight", "activation_weight", "information_weight"))

    def distil(self, teachers: Teachers, job: Job) -> Artifact:
        """Let generator and student learn on the same batches.

        Args:
            teachers: the clients' models.
            job: the common model, the server's random source.
        """
        studio = self.studio(teachers, job)
        source = studio.source
        source.reset(studio.rng.torch("generator"))
        source.train()
        optimizer = torch.optim.Adam(
            source.parameters(), lr=self.synthesis.learning_rate, betas=(0.5, 0.999), fused=True
        )
        studio.keep("generator", lambda: detached_state(source), lambda state: load_state(source, state))
        studio.keep(
            "generator_optimizer",
            lambda: optimizer_memory(optimizer),
            lambda memory: restore_optimizer(optimizer, memory),
        )
        for epoch in studio.epochs():
            self._learn(studio, optimizer, epoch, job)
        self._show(studio, job)
        return self.taught(studio.learner, job)

    def _learn(self, studio: Studio, optimizer: torch.optim.Optimizer, epoch: int, job: Job) -> None:
        """An epoch of steps, each on a new batch."""
        rng, size = studio.rng.child("epoch", epoch), self.synthesis.batch_size
        draw, views = rng.torch("latent"), rng.torch("augment")
        studio.learner.student.train()
        total = torch.zeros((), device=studio.device)
        for _ in range(self.synthesis.num_steps):
            latent = torch.randn(size, self.synthesis.latent_size, generator=draw).to(studio.device)
            with studio.teachers.penultimate() as features:
                known, x = self._answer(studio, latent, views)
            loss = self._objective(known, features, job)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if self.synthesis.grad_clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(studio.source.parameters(), self.synthesis.grad_clip_norm)
            optimizer.step()
            total += studio.learner.step(x.detach(), known.detach()) + loss.detach()
        studio.learner.student.eval()
        check_loss(float(total), "synthesis")

    def _answer(self, studio: Studio, latent: Tensor, views: torch.Generator) -> tuple[Tensor, Tensor]:
        nobody = torch.zeros(len(latent), dtype=torch.int64, device=studio.device)
        draft = studio.draft(studio.made(latent), nobody, views, watch=False)
        return studio.teachers.mix(draft.logits), draft.x

    def _objective(self, known: Tensor, features: list[Tensor | None], job: Job) -> Tensor:
        loss = self.one_hot_weight * F.cross_entropy(known, known.detach().argmax(1))
        found = [mean_activation(values.float()) for values in features if values is not None]
        if found:
            loss = loss - self.activation_weight * torch.stack(found).mean()
        elif self.activation_weight:
            job.note(NO_FEATURES)
        return loss - self.information_weight * batch_information(known)

    def _show(self, studio: Studio, job: Job) -> None:
        latent = torch.randn(64, self.synthesis.latent_size, generator=studio.rng.torch("picture")).to(studio.device)
        studio.source.eval()
        with torch.no_grad():
            show_inputs(self.name, studio.made(latent), job)
