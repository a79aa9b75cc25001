"""Teach a student what teachers answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.ops.distillation import kd_divergence


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How a student learns.

    Args:
        batch_size: inputs per step, at least 2.
        learning_rate: above 0.
        optimizer: ``sgd`` or ``adam``.
        momentum: of sgd, in [0, 1).
        weight_decay: L2 penalty, 0 or more.
        schedule: ``constant``, or ``cosine`` down to 0 over the whole work.
        kd_temperature: of the softened answers, above 0.
        grad_clip_norm: largest gradient norm; ``None`` does not clip.
        num_batches: steps per pass at most, on a random part of what there is; ``None`` is all of it.
        augment: train on the augmentation that clients use; the teachers see the same views.
        precision: ``fp32``, or ``bf16`` (mixed: parameters and losses stay fp32).
    """

    batch_size: int = 128
    learning_rate: float = 0.01
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    kd_temperature: float = 4.0
    grad_clip_norm: float | None = None
    num_batches: int | None = None
    augment: bool = True
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        for name, least in {"batch_size": 2, "weight_decay": 0, "grad_clip_norm": 0, "num_batches": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}", where=f"distillation.{name}", fix=f"give at least {least}")
        for name in ("learning_rate", "kd_temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}", where=f"distillation.{name}", fix="give a number above 0"
                )
        if not 0 <= self.momentum < 1:
            raise ConfigError(
                f"momentum is {self.momentum}", where="distillation.momentum", fix="give a number in [0, 1)"
            )


class Learner:
    """A student with its optimiser.

    Args:
        student: trained in place.
        settings: how.
        device: where.
    """

    def __init__(self, student: nn.Module, settings: Distillation, device: torch.device) -> None:
        self.student, self.settings = student.to(device), settings
        student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        parameters = [p for p in student.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer
        if settings.optimizer == "adam":
            self.optimizer = torch.optim.Adam(
                parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
            )
        else:
            self.optimizer = torch.optim.SGD(
                parameters,
                lr=settings.learning_rate,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
                fused=True,
            )

    def schedule(self, done: float) -> None:
        """Set the learning rate for a point of the work.

        Args:
            done: fraction of the work that is done, in [0, 1].
        """
        if self.settings.schedule == "cosine":
            rate = self.settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
            self.optimizer.param_groups[0]["lr"] = rate

    def step(self, x: Tensor, target: Tensor) -> Tensor:
        """One step towards the teachers' answers.

        Args:
            x: inputs, shape ``(n, *input_shape)``.
            target: the teachers' logits, shape ``(n, num_classes)``.

        Returns:
            The mean divergence before the step; no gradient.
        """
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            answer = self.student(x)
        return self.descend(kd_divergence(answer.float(), target, self.settings.kd_temperature).mean())

    def descend(self, loss: Tensor) -> Tensor:
        """One step down a loss.

        Args:
            loss: a scalar.

        Returns:
            The loss; no gradient.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.settings.grad_clip_norm is not None:
            nn.utils.clip_grad_norm_(self.student.parameters(), self.settings.grad_clip_norm)
        self.optimizer.step()
        return loss.detach()

    def memory(self) -> dict[str, Tensor]:
        """What the optimiser remembers, as tensors by name."""
        return optimizer_memory(self.optimizer)

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`memory` gave.

        Args:
            memory: tensors by name.
        """
        restore_optimizer(self.optimizer, memory)


def optimizer_memory(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser remembers, as tensors by name.

    Args:
        optimizer: any.
    """
    found = {}
    for position, slots in optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            if isinstance(value, Tensor):
                found[f"{position}.{name}"] = value.detach().to("cpu", copy=True)
    return found


def restore_optimizer(optimizer: torch.optim.Optimizer, memory: Mapping[str, Tensor]) -> None:
    """Put back what :func:`optimizer_memory` gave.

    Args:
        optimizer: over the same parameters; changed in place.
        memory: tensors by name.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in memory.items():
        position, _, name = key.partition(".")
        parameter = parameters[int(position)]
        if value.shape == parameter.shape:
            # Fused optimisers walk through memory: what they remember must lie as the parameter does.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(position), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def check_loss(loss: float, where: str) -> None:
    """Stop where a loss is no longer finite.

    Args:
        loss: the value.
        where: whose settings to mend.

    Raises:
        DataError: it is not.
    """
    if not math.isfinite(loss):
        raise DataError(
            f"the server's training diverged: the loss is {loss}",
            where=where,
            fix=f"lower {where}.learning_rate, or set {where}.grad_clip_norm",
        )
