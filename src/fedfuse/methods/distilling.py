"""What all methods that distil the clients' models into one have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fedfuse.core.artifact import Artifact, ModelSpec, detached_state, load_state
from fedfuse.core.cohort import Cohort, Replies
from fedfuse.core.errors import ConfigError
from fedfuse.core.method import Fused, Job, Method
from fedfuse.core.settings import to_json
from fedfuse.methods.tasks import LocalTraining, client_artifact
from fedfuse.models import family, spec
from fedfuse.models.ensemble import Ensemble
from fedfuse.models.foundation import is_foundation
from fedfuse.training.distillation import Distillation, Learner
from fedfuse.training.synthesis import Studio, Synthesis
from fedfuse.training.teachers import Teachers

NO_BATCHNORM = "no client's model has BatchNorm statistics: inputs are made without that term"


@dataclass(frozen=True, kw_only=True)
class Distilling(LocalTraining):
    """Methods whose server teaches one student what the clients' models know.

    The clients' models may differ; the student is of any family.

    Args:
        local: how clients train.
        student: ``{family: ..., its settings}``; the common model if left out.
        distillation: how the student learns.
    """

    student: Mapping[str, Any] = field(default_factory=dict)
    distillation: Distillation = field(default_factory=Distillation)

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Collect the models, teach the student.

        Args:
            cohort: the clients.
            job: says which model each client owns.
        """
        self.student_spec(job)
        return Fused(model=self.distil(client_teachers(self.local_models(cohort, job), job), job))

    def distil(self, teachers: Teachers, job: Job) -> Artifact:
        """The server's procedure, once the models are there.

        Args:
            teachers: the clients' models, or any others that know the task.
            job: the common model, the server's random source.

        Returns:
            The student.
        """
        raise NotImplementedError

    def student_spec(self, job: Job) -> ModelSpec:
        """Which model the student is.

        Args:
            job: holds the common model.

        Raises:
            ConfigError: ``student`` names no family, or its settings are wrong.
        """
        return student_of(self.student, job)

    def learner(self, job: Job, start: Mapping[str, torch.Tensor] | None = None) -> Learner:
        """The student before it has learned anything.

        Args:
            job: holds the common model.
            start: its first weights; fresh ones if left out.
        """
        student = self.student_spec(job).build()
        if start is not None:
            load_state(student, start)
        return Learner(student, self.distillation, job.device)

    def taught(self, learner: Learner, job: Job) -> Artifact:
        """The artifact of the student.

        Args:
            learner: holds it.
            job: holds the common model.
        """
        return Artifact.of(self.student_spec(job), detached_state(learner.student))


@dataclass(frozen=True, kw_only=True)
class DataFree(Distilling):
    """Methods that make the inputs which they distil on.

    Args:
        local: how clients train.
        student: ``{family: ..., its settings}``; the common model if left out.
        distillation: how the student learns.
        synthesis: how inputs are made.
    """

    synthesis: Synthesis = field(default_factory=Synthesis)

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Collect the models, make inputs, teach the student.

        Args:
            cohort: the clients.
            job: says which model each client owns.
        """
        check_makes_inputs(job)
        return super().fuse(cohort, job)

    def studio(self, teachers: Teachers, job: Job, **others: Any) -> Studio:
        """The engine for these teachers.

        Args:
            teachers: whose knowledge it is.
            job: the server's random source, checkpoints and progress.
            others: further settings of the engine, such as ``source``.
        """
        return open_studio(self.name, self.synthesis, self.learner(job), teachers, job, **others)

    def shown(self, studio: Studio, job: Job) -> Artifact:
        """Show what was made, and give back the student.

        Args:
            studio: after its last epoch.
            job: where the picture goes.
        """
        show_inputs(self.name, latest_inputs(studio), job)
        return self.taught(studio.learner, job)


def check_makes_inputs(job: Job) -> None:
    """Refuse models whose inputs cannot be made by following gradients, before any client works.

    Args:
        job: the common model.

    Raises:
        ConfigError: inputs are tokens.
    """
    if is_foundation(job.model):
        raise ConfigError(
            "inputs that are tokens cannot be made by gradients",
            where="method.name",
            fix="use a method for adapters, such as fedit or flora, or feddf with data: server",
        )


def student_of(student: Mapping[str, Any], job: Job) -> ModelSpec:
    """Which model a setting ``student`` means.

    Args:
        student: ``{family: ..., its settings}``; empty for the common model.
        job: holds the common model.

    Raises:
        ConfigError: it names no family, or its settings are wrong.
    """
    if not student:
        return job.model
    settings = dict(student)
    name = settings.pop("family", None)
    if not isinstance(name, str):
        raise ConfigError(
            "the student has no family", where="method.student.family", fix="write student: {family: cnn, ...}"
        )
    return spec(
        name,
        to_json(family(name, settings)),
        input_shape=job.model.input_shape,
        num_classes=job.model.num_classes,
        seed=job.model.seed,
    )


def client_teachers(replies: Replies, job: Job) -> Teachers:
    """The clients' models, ready to be asked.

    Args:
        replies: uploads with ``model/*``.
        job: says which model each client owns.
    """
    artifacts = [client_artifact(job, client_id, replies[client_id]) for client_id in replies]
    return Teachers(
        [artifact.module() for artifact in artifacts],
        device=job.device,
        recipes=[artifact.recipe for artifact in artifacts],
        is_opaque=any(artifact.template is not None for artifact in artifacts),
    )


def open_studio(
    name: str, synthesis: Synthesis, learner: Learner, teachers: Teachers, job: Job, **others: Any
) -> Studio:
    """The engine for a method.

    Args:
        name: of the method.
        synthesis: how inputs are made.
        learner: who learns from them.
        teachers: whose knowledge it is.
        job: the server's random source, checkpoints and progress.
        others: further settings of the engine, such as ``source``.

    Raises:
        ConfigError: the models take no inputs that can be made.
    """
    if "source" not in others and len(job.model.input_shape) not in (1, 3):
        raise ConfigError(
            f"{name} makes images or vectors, and the models take inputs of shape {job.model.input_shape}",
            where="method.name",
            fix="use a method that makes no inputs, such as feddf with server data, or fusefl",
        )
    return Studio(
        synthesis,
        learner,
        teachers,
        inputs=job.inputs,
        input_shape=job.model.input_shape,
        num_classes=job.model.num_classes,
        rng=job.rng.child("synthesis"),
        checkpoints=job.checkpoints.child(teachers.digest),
        progress=lambda done, total: job.progress(f"{name}: making inputs", done, total),
        **others,
    )


def latest_inputs(studio: Studio) -> torch.Tensor:
    """Up to 64 inputs of the last batch, of one class after another.

    Args:
        studio: after its last epoch.

    Returns:
        Raw, shape ``(n, *input_shape)``.
    """
    last = torch.arange(max(0, len(studio.pool) - studio.settings.batch_size), len(studio.pool))
    order = last[torch.argsort(studio.pool.labels[last], stable=True)]
    return studio.pool.images(order[:: max(1, len(order) // 64)][:64])


def show_inputs(name: str, raw: torch.Tensor, job: Job) -> None:
    """Show inputs in the report, where they are images.

    Args:
        name: of the method.
        raw: shape ``(n, *input_shape)``.
        job: where the picture goes.
    """
    if job.inputs.is_pixels and raw.ndim == 4 and raw.shape[1] in (1, 3):
        job.picture(name, raw)


def note_statistics(teachers: Teachers, job: Job, batchnorm_weight: float) -> bool:
    """Say so where a method wants BatchNorm statistics and no model has any.

    Args:
        teachers: the clients' models.
        job: what is said goes into its notes.
        batchnorm_weight: of the distance to these statistics; 0 does without.

    Returns:
        Whether the distance is to be computed.
    """
    if batchnorm_weight and not teachers.has_batchnorm:
        job.note(NO_BATCHNORM)
    return batchnorm_weight > 0 and teachers.has_batchnorm


def weighted_ensemble(teachers: Teachers, weights: torch.Tensor, job: Job) -> Artifact:
    """The artifact of the teachers themselves, side by side.

    Args:
        teachers: with the recipes of their models.
        weights: of each, shape ``(num_models,)``; they are divided by their sum.
        job: the common model.

    Raises:
        ConfigError: nothing says how the models are built.
    """
    if len(teachers.recipes) != len(teachers.models):
        raise ConfigError(
            "these models have no recipes: they cannot be put into a file",
            where="method.result",
            fix="use result: student",
        )
    num_classes = job.model.num_classes
    net = Ensemble(teachers.models, combine="mean_logits", num_classes=num_classes, recipes=teachers.recipes)
    shares = weights.detach().cpu() / weights.detach().cpu().sum()
    net.weights.copy_(shares[:, None].expand(-1, num_classes))
    return Artifact(net.recipe, detached_state(net), template=net.cpu() if teachers.is_opaque else None)


def check_numbers(method: Method, *, at_least_0: Sequence[str] = (), above_0: Sequence[str] = ()) -> None:
    """Refuse settings out of their range.

    Args:
        method: whose.
        at_least_0: names of settings that may be 0.
        above_0: names of settings that may not.

    Raises:
        ConfigError: one is out of range, or no number.
    """
    for name in (*at_least_0, *above_0):
        value = getattr(method, name)
        if not (value > 0 or (name in at_least_0 and value == 0)):
            least = "0 or more" if name in at_least_0 else "a number above 0"
            raise ConfigError(f"{name} is {value}", where=f"method.{name}", fix=f"give {least}")
