"""Make inputs from what models know, and teach a student on them: the engine of the data-free methods.

A method says what a good batch is and when the student learns; making, keeping, showing, checkpointing and going on
after a crash live here, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedfuse.core.artifact import detached_state, load_state
from fedfuse.core.checkpoints import Checkpoints
from fedfuse.core.errors import ConfigError
from fedfuse.core.examples import InputSpace
from fedfuse.core.payload import Payload
from fedfuse.core.seeding import Rng
from fedfuse.data.augment import augment_batch
from fedfuse.models.generator import Generator, Pixels
from fedfuse.ops.distillation import output_diversity_direction
from fedfuse.training.distillation import Learner, check_loss
from fedfuse.training.pool import Pool
from fedfuse.training.sgd import batches
from fedfuse.training.teachers import Teachers


@dataclass(frozen=True)
class Draft:
    """A batch in the making, and what the teachers say of it.

    Args:
        x: an augmented view, as models see it.
        labels: the classes that are wanted, shape ``(n,)``.
        logits: every teacher's answer, shape ``(num_models, n, num_classes)``; gradients reach ``x``.
        distance: of the batch's statistics to those that the teachers' BatchNorm layers remember, averaged over
            teachers; 0 where there are none.
    """

    x: Tensor
    labels: Tensor
    logits: Tensor
    distance: Tensor


Objective = Callable[[Draft], Tensor]
"""What a good batch is: a scalar that falls as the batch gets better."""

_CACHE_BYTES = 512 << 20


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """How inputs are made.

    Args:
        num_epochs: batches that are made, one after another, at least 1.
        num_steps: optimiser steps per batch, at least 1.
        batch_size: inputs per batch, at least 2.
        learning_rate: of Adam, for generator and latent vectors, above 0.
        latent_size: length of a latent vector.
        width: channels of the generator's first maps.
        grad_clip_norm: largest gradient norm of the generator; ``None`` does not clip.
        precision: ``fp32``, or ``bf16`` (mixed: parameters and losses stay fp32).
    """

    num_epochs: int = 100
    num_steps: int = 30
    batch_size: int = 128
    learning_rate: float = 1e-3
    latent_size: int = 256
    width: int = 64
    grad_clip_norm: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        limits = {"num_epochs": 1, "num_steps": 1, "batch_size": 2, "latent_size": 1, "width": 1, "grad_clip_norm": 0}
        for name, least in limits.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}", where=f"synthesis.{name}", fix=f"give at least {least}")
        if not self.learning_rate > 0:
            raise ConfigError(
                f"learning_rate is {self.learning_rate}", where="synthesis.learning_rate", fix="give a number above 0"
            )


class Studio:
    """Teachers, a student, and the inputs that are made for it.

    Args:
        settings: how inputs are made.
        learner: the student.
        teachers: whose knowledge it is.
        inputs: what inputs look like.
        input_shape: of one input.
        num_classes: number of classes.
        rng: the source of all randomness.
        checkpoints: where the state is kept after each epoch.
        progress: called with (epochs done, epochs in all).
        source: what makes the inputs; a generator by the settings if left out.

    Attributes:
        pool: what was made so far.
        weights: of the teachers in their common answer; a method may change them.
        epoch: the epoch at hand.
    """

    def __init__(
        self,
        settings: Synthesis,
        learner: Learner,
        teachers: Teachers,
        *,
        inputs: InputSpace,
        input_shape: tuple[int, ...],
        num_classes: int,
        rng: Rng,
        checkpoints: Checkpoints | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        source: Generator | Pixels | None = None,
    ) -> None:
        self.settings, self.learner, self.teachers, self.inputs = settings, learner, teachers, inputs
        self.num_classes, self.rng, self.device = num_classes, rng, teachers.device
        self.source = source or Generator(
            input_shape,
            latent_size=settings.latent_size,
            width=settings.width,
            is_pixels=inputs.is_pixels,
        )
        self.source.to(self.device)
        self.pool = Pool(is_pixels=inputs.is_pixels)
        self.weights = teachers.weights.clone()
        self.epoch = 0
        self._checkpoints = checkpoints or Checkpoints()
        self._progress = progress
        self._answers: list[Tensor] = []
        self._kept: dict[str, tuple[Callable[[], dict[str, Tensor]], Callable[[dict[str, Tensor]], None]]] = {}

    def keep(self, name: str, give: Callable[[], dict[str, Tensor]], take: Callable[[dict[str, Tensor]], None]) -> None:
        """Keep something more of the method's own in checkpoints, such as a module's state dict.

        Args:
            name: what it is called; said before the first epoch.
            give: returns its tensors.
            take: puts them back.
        """
        self._kept[name] = (give, take)

    def epochs(self) -> Iterator[int]:
        """The epochs that are left; each is checkpointed when the next is asked for.

        Yields:
            The epoch's number, from 0, or from where an earlier run was killed.
        """
        total = self.settings.num_epochs
        self._continue()
        self._progress(self.epoch, total)
        while self.epoch < total:
            self.learner.schedule(self.epoch / total)
            num_before = len(self.pool)
            yield self.epoch
            self.epoch += 1
            self._save(num_before)
            self._progress(self.epoch, total)

    def make(self, objective: Objective, *, labels: Tensor | None = None, watch: bool = True) -> tuple[Tensor, Tensor]:
        """Make one batch from a fresh start.

        Args:
            objective: what a good batch is.
            labels: classes that are wanted, shape ``(batch_size,)``; drawn uniformly if left out.
            watch: whether the objective needs the distance to BatchNorm statistics.

        Returns:
            The best raw inputs of all steps and their labels; no gradient.
        """
        rng, settings, source = self.rng.child("make", self.epoch), self.settings, self.source
        source.reset(rng.torch("weights"))
        source.train()
        self.learner.student.eval()
        size = settings.batch_size
        latent = torch.randn(size, settings.latent_size, generator=rng.torch("latent")).to(self.device)
        if labels is None:
            labels = torch.randint(self.num_classes, (size,), generator=rng.torch("labels"))
        labels = labels.to(self.device)
        # The student only judges; without gradients of its own it costs half.
        judged = [p for p in self.learner.student.parameters() if p.requires_grad]
        for parameter in judged:
            parameter.requires_grad_(False)
        latent.requires_grad_()
        parameters = [*source.parameters(), latent]
        optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate, betas=(0.5, 0.999), fused=True)
        best, lowest = torch.empty(0), torch.full((), torch.inf, device=self.device)
        draw = rng.torch("augment")
        try:
            for _ in range(settings.num_steps):
                raw = self.made(latent)
                loss = objective(self.draft(raw, labels, draw, watch=watch))
                is_better = loss.detach() < lowest
                best = torch.where(is_better, raw.detach(), best) if len(best) else raw.detach()
                lowest = torch.minimum(lowest, loss.detach())
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if settings.grad_clip_norm is not None:
                    nn.utils.clip_grad_norm_(source.parameters(), settings.grad_clip_norm)
                optimizer.step()
        finally:
            for parameter in judged:
                parameter.requires_grad_()
        check_loss(float(lowest), "synthesis")
        return best, labels

    def draft(self, raw: Tensor, labels: Tensor, draw: torch.Generator | None = None, *, watch: bool = True) -> Draft:
        """What the teachers say of raw inputs.

        Args:
            raw: shape ``(n, *input_shape)``.
            labels: the classes that are wanted, shape ``(n,)``.
            draw: decides the augmentation; ``None`` does not augment.
            watch: whether the distance to BatchNorm statistics is needed; else it is 0.
        """
        x, nothing = self.view(raw, draw), torch.zeros((), device=self.device)
        with self._autocast(self.settings.precision):
            if not watch:
                return Draft(x, labels, self.teachers.logits(x), nothing)
            with self.teachers.watched() as statistics:
                logits = self.teachers.logits(x)
        return Draft(x, labels, logits, statistics.distance().to(self.device))

    def made(self, latent: Tensor) -> Tensor:
        """What the source makes of latent vectors.

        Args:
            latent: shape ``(n, latent_size)``.

        Returns:
            Raw inputs, float32, shape ``(n, *input_shape)``.
        """
        with self._autocast(self.settings.precision):
            raw: Tensor = self.source(latent)
        return raw.float()

    def guess(self, x: Tensor) -> Tensor:
        """What the student says of a draft.

        Args:
            x: an augmented view, as models see it.

        Returns:
            Logits, float32, shape ``(n, num_classes)``; gradients reach ``x``.
        """
        with self._autocast(self.settings.precision):
            logits: Tensor = self.learner.student(x)
        return logits.float()

    def harder(self, x: Tensor, draw: torch.Generator, step_size: float) -> Tensor:
        """Move inputs to where the common answer changes most, each in a random direction of the answer.

        Co-Boosting, Dai et al., ICLR 2024, after output diversified sampling, Tashiro, Song and Ermon, NeurIPS 2020.

        Args:
            x: as models see them, shape ``(n, *input_shape)``.
            draw: decides the directions; on the CPU.
            step_size: of pixels in [0, 1], which stay there; or of normalised features.

        Returns:
            The same shape; no gradient.
        """
        direction = (torch.rand(len(x), self.num_classes, generator=draw) * 2 - 1).to(self.device)

        def answer(seen: Tensor) -> Tensor:
            with self._autocast(self.learner.settings.precision):
                return self.teachers.answer(seen, self.weights)

        sign = output_diversity_direction(x, answer, direction, self.learner.settings.kd_temperature)
        if not self.inputs.is_pixels:
            return x + step_size * sign
        # Standard deviations are positive: the sign is the same for pixels.
        return self.inputs.normalize((self.inputs.restore(x) + step_size * sign).clamp(0, 1))

    def view(self, raw: Tensor, draw: torch.Generator | None = None) -> Tensor:
        """Raw inputs as a model in training sees them.

        Args:
            raw: shape ``(n, *input_shape)``.
            draw: decides the augmentation; ``None`` does not augment.
        """
        x = self.inputs.normalize(raw)
        if draw is not None and self.learner.settings.augment:
            x = augment_batch(self.inputs.augment, x, draw)
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

    @property
    def is_plain(self) -> bool:
        """Whether the student sees the pool as it is, so that every answer of the teachers can be kept."""
        return not self.learner.settings.augment or self.inputs.augment == "none"

    def answers(self) -> Tensor:
        """Every teacher's answer to every input of the pool as it is, computed once.

        Returns:
            Shape ``(num_models, len(pool), num_classes)``.
        """
        known = sum(part.shape[1] for part in self._answers)
        if known < len(self.pool):
            fresh = torch.arange(known, len(self.pool))
            with torch.no_grad(), self._autocast(self.learner.settings.precision):
                parts = [self.teachers.logits(self.view(self.pool.images(i).to(self.device))) for i in fresh.split(512)]
            self._answers = [torch.cat([*self._answers, *parts], 1)]
        return self._answers[0]

    def teach(
        self,
        *,
        lesson: Objective | None = None,
        perturb: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    ) -> float:
        """One pass of the student over the pool.

        Args:
            lesson: what the student is to lower on a batch, the teachers' answers given; the divergence from their
                common answer if left out.
            perturb: changes each batch before anyone sees it: ``(x, draw)`` to the same shape.

        Returns:
            The mean loss.
        """
        rng, settings, student = self.rng.child("teach", self.epoch), self.learner.settings, self.learner.student
        num_bytes = len(self.pool) * len(self.teachers.models) * self.num_classes * 4
        answers = self.answers() if self.is_plain and perturb is None and num_bytes < _CACHE_BYTES else None
        draw = rng.torch("augment")
        student.train()
        total, num_steps = torch.zeros((), device=self.device), 0
        for index in batches(len(self.pool), settings.batch_size, rng.torch("order")):
            if num_steps == settings.num_batches:
                break
            x = self.view(self.pool.images(index).to(self.device), draw)
            if perturb is not None:
                x = perturb(x, draw)
            with torch.no_grad(), self._autocast(settings.precision):
                logits = self.teachers.logits(x) if answers is None else answers[:, index.to(self.device)]
            if lesson is None:
                total += self.learner.step(x, self.teachers.mix(logits, self.weights))
            else:
                labels = self.pool.labels[index].to(self.device)
                total += self.learner.descend(lesson(Draft(x, labels, logits, torch.zeros((), device=self.device))))
            num_steps += 1
        student.eval()
        loss = float(total) / num_steps
        check_loss(loss, "distillation")
        return loss

    def _autocast(self, precision: str) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")

    def _save(self, num_before: int) -> None:
        added = Payload({"images": self.pool.stored[num_before:], "labels": self.pool.labels[num_before:]})
        self._checkpoints.save(f"pool_{self.epoch - 1}", added)
        state = Payload({"epoch": self.epoch, "weights": self.weights.cpu()})
        state.put_group("student", detached_state(self.learner.student))
        state.put_group("optimizer", self.learner.memory())
        for name, (give, _) in self._kept.items():
            state.put_group(f"kept_{name}", give())
        # Written after the pool's part: a state is never there without the inputs that it saw.
        self._checkpoints.save("state", state)

    def _continue(self) -> None:
        state = self._checkpoints.load("state")
        if state is None:
            return
        num_epochs = int(state.number("epoch"))
        parts = [self._checkpoints.load(f"pool_{k}") for k in range(num_epochs)]
        if any(part is None for part in parts):
            return
        for part in parts:
            if part is not None and len(part.tensor("labels")):
                self.pool.add(part.tensor("images"), part.tensor("labels"))
        self.epoch, self.weights = num_epochs, state.tensor("weights").to(self.device)
        load_state(self.learner.student, state.group("student"))
        self.learner.remember(state.group("optimizer"))
        for name, (_, take) in self._kept.items():
            take(state.group(f"kept_{name}"))
