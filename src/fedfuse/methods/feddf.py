"""Ensemble distillation on inputs that nobody labelled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fedfuse.core.artifact import Artifact, detached_state
from fedfuse.core.cohort import Cohort
from fedfuse.core.errors import ConfigError
from fedfuse.core.method import Fused, Job, register_method
from fedfuse.core.payload import Payload
from fedfuse.methods.distilling import (
    DataFree,
    check_makes_inputs,
    check_numbers,
    client_teachers,
    note_statistics,
    open_studio,
)
from fedfuse.methods.tasks import example_weights
from fedfuse.models.generator import Pixels
from fedfuse.rules import fuse_uploads
from fedfuse.rules.mean import Mean
from fedfuse.training.distillation import Distillation
from fedfuse.training.synthesis import Draft, Studio
from fedfuse.training.teachers import Teachers


@register_method("feddf", paper="https://arxiv.org/abs/2006.07242", reference="Lin et al., NeurIPS 2020")
@dataclass(frozen=True, kw_only=True)
class FedDF(DataFree):
    """The mean of the clients' models learns what they answer together to inputs without labels.

    Lin et al., NeurIPS 2020, algorithm 1 in one round: the student starts from the weighted mean of the clients'
    weights and is distilled from the mean of their logits by Adam with a cosine schedule.

    Exchanges: one, ``local_models``.

    Departures: the last student is taken; the paper stops early on a validation set. ``synthetic`` inputs are made
    from the clients' models by the engine of the data-free methods, not by a generator trained on other data. A
    student of another kind than the clients' models starts fresh.

    Args:
        local: how clients train.
        student: ``{family: ..., its settings}``; the common model if left out.
        distillation: how the student learns.
        synthesis: how ``synthetic`` inputs are made: a batch per epoch, each followed by a pass over all there are.
        num_passes: passes over the inputs, at least 1; with synthetic ones at least ``synthesis.num_epochs``.
        start: the student starts from the ``average`` of the clients' models where they are of its kind, or ``fresh``.
        data: what it learns on: the ``server`` data, ``noise`` (uniform pixels or standard normal numbers), or
            ``synthetic`` inputs. ``auto`` takes the first that there can be of server and synthetic, else noise.
        num_noise: how many inputs of noise, at least 2.
        batchnorm_weight: of the distance to BatchNorm statistics in making synthetic inputs, 0 or more.
    """

    distillation: Distillation = field(
        default_factory=lambda: Distillation(
            learning_rate=1e-3, optimizer="adam", schedule="cosine", kd_temperature=1.0, augment=False
        )
    )
    num_passes: int = 20
    start: Literal["average", "fresh"] = "average"
    data: Literal["auto", "server", "noise", "synthetic"] = "auto"
    num_noise: int = 2000
    batchnorm_weight: float = 1.0

    def __post_init__(self) -> None:
        for name, least in {"num_passes": 1, "num_noise": 2}.items():
            if getattr(self, name) < least:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}", where=f"method.{name}", fix=f"give at least {least}"
                )
        check_numbers(self, at_least_0=("batchnorm_weight",))

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Collect the models, average them where they are alike, teach the student.

        Args:
            cohort: the clients.
            job: says which model each client owns.
        """
        self._kind(job)
        student = self.student_spec(job)
        replies = self.local_models(cohort, job)
        # Read one by one, and checked where a client's number of examples is no number of examples.
        weights = example_weights(replies)
        start = None
        if self.start == "average" and not job.client_models and student.digest == job.model.digest:
            start = fuse_uploads(replies.uploads(), Mean(), weights)
        return Fused(model=self._taught(client_teachers(replies, job), job, start))

    def distil(self, teachers: Teachers, job: Job) -> Artifact:
        """Teach a student that starts from the plain mean of the teachers where they are of its kind.

        Args:
            teachers: any models that know the task.
            job: the common model, the server's data and random source.
        """
        start = None
        if self.start == "average":
            states = [detached_state(model) for model in teachers.models]
            own = self.student_spec(job).build().state_dict()
            shapes = {name: tensor.shape for name, tensor in own.items()}
            if all({name: tensor.shape for name, tensor in state.items()} == shapes for state in states):
                start = fuse_uploads(states, Mean(), teachers.weights.tolist(), group="")
        return self._taught(teachers, job, start)

    def _taught(self, teachers: Teachers, job: Job, start: Mapping[str, Tensor] | None) -> Artifact:
        kind = self._kind(job)
        raw = None if kind == "synthetic" else self._inputs(kind, job)
        studio = self._studio(teachers, job, raw, kind, start)
        if start is None and self.start == "average":
            job.note("the student is of another kind than the clients' models: it started fresh")
        watch = raw is None and note_statistics(teachers, job, self.batchnorm_weight)

        def objective(draft: Draft) -> Tensor:
            wanted = F.cross_entropy(teachers.mix(draft.logits), draft.labels)
            return wanted + self.batchnorm_weight * draft.distance

        if raw is not None:
            # Known from the start, so no checkpoint need hold them.
            studio.pool.is_pixels = False
            studio.pool.add(raw, torch.full((len(raw),), -1))
        for epoch in studio.epochs():
            if raw is None and epoch < self.synthesis.num_epochs:
                studio.pool.add(*studio.make(objective, watch=watch))
            studio.teach()
        return self.shown(studio, job) if raw is None else self.taught(studio.learner, job)

    def _kind(self, job: Job) -> Literal["server", "noise", "synthetic"]:
        if self.data == "server" and job.server_data is None:
            raise ConfigError(
                "the server has no data of its own",
                where="method.data",
                fix="declare some with data: {server: ...}, or use data: synthetic or noise",
            )
        if self.data == "server" or (self.data == "auto" and job.server_data is not None):
            return "server"
        check_makes_inputs(job)
        if self.data != "auto":
            return self.data
        return "synthetic" if len(job.model.input_shape) in (1, 3) else "noise"

    def _inputs(self, kind: Literal["server", "noise"], job: Job) -> Tensor:
        """Raw inputs of the server's own, or noise."""
        if kind == "server":
            assert job.server_data is not None
            job.note(f"the student learned on {len(job.server_data):,} inputs of the server's own")
            return job.inputs.restore(job.server_data.x)
        job.note(f"the student learned on {self.num_noise:,} inputs of pure noise")
        shape, draw = (self.num_noise, *job.model.input_shape), job.rng.torch("noise")
        if job.inputs.is_pixels:
            return torch.rand(shape, generator=draw)
        return job.inputs.restore(torch.randn(shape, generator=draw))

    def _studio(
        self, teachers: Teachers, job: Job, raw: Tensor | None, kind: str, start: Mapping[str, Tensor] | None
    ) -> Studio:
        num_passes = self.num_passes
        if kind == "synthetic":
            num_passes = max(num_passes, self.synthesis.num_epochs)
            made = self.synthesis.num_epochs * self.synthesis.batch_size
            job.note(f"the student learned on {made:,} inputs made from the clients' models")
        elif kind == "server" and raw is not None:
            # Only here: a copy of the job looks at all that it holds, also at data that is not to be used.
            job = dataclasses.replace(job, checkpoints=job.checkpoints.child(Payload({"raw": raw}).digest()))
        # The engine's epochs are the passes; where nothing is made, nothing needs to be able to make it.
        timed = dataclasses.replace(self.synthesis, num_epochs=num_passes)
        others = {} if raw is None else {"source": Pixels(1, job.model.input_shape, is_pixels=False)}
        return open_studio(self.name, timed, self.learner(job, start), teachers, job, **others)
