"""The local training loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.examples import Examples
from fedfuse.core.judging import HasObjective
from fedfuse.core.seeding import Rng
from fedfuse.data.augment import augment_batch
from fedfuse.training.evaluation import evaluate
from fedfuse.training.private_sgd import PrivateTraining, check_trains_privately, train_privately


@dataclass(frozen=True, kw_only=True)
class LocalSGD:
    """How a client trains on its own data.

    Args:
        num_epochs: passes over the client's data in the whole run, at least 1. A method with several exchanges that
            train divides them (see :meth:`share`), so that methods compare at equal local work.
        batch_size: examples per step, at least 1.
        learning_rate: above 0.
        optimizer: ``sgd``, or ``adamw`` (Loshchilov and Hutter, ICLR 2019), as is usual for transformers.
        momentum: of ``sgd``, in [0, 1).
        weight_decay: L2 penalty, 0 or more.
        schedule: ``constant``, or ``cosine`` down to 0 within each exchange.
        patience: epochs without a lower validation loss after which training stops and the best weights are put back;
            ``None`` trains to the end. Uses the client's validation part.
        grad_clip_norm: largest gradient norm; ``None`` does not clip.
        precision: ``fp32``, or ``bf16`` (mixed: parameters stay fp32).
        channels_last: memory format of images; faster for convolutions.
        compile: use ``torch.compile``; pays for large models only.
        privacy: train by DP-SGD; ``None`` trains plainly.
    """

    num_epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 0.01
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    patience: int | None = None
    grad_clip_norm: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = True
    compile: bool = False
    privacy: PrivateTraining | None = None

    def __post_init__(self) -> None:
        limits = {
            "num_epochs": 1,
            "batch_size": 1,
            "weight_decay": 0,
            "momentum": 0,
            "patience": 1,
            "grad_clip_norm": 0,
        }
        for name, least in limits.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}", where=f"local.{name}", fix=f"give at least {least}")
        if not self.learning_rate > 0 or not self.momentum < 1:
            raise ConfigError(
                f"learning_rate {self.learning_rate} and momentum {self.momentum} cannot train",
                where="local",
                fix="give a learning_rate above 0 and a momentum below 1",
            )

    def share(self, part: int, num_parts: int) -> int:
        """Epochs of one of several exchanges; the first ones get what does not divide evenly.

        Args:
            part: 0 to ``num_parts - 1``.
            num_parts: exchanges that train.

        Returns:
            Epochs of that part; the parts add up to ``num_epochs``.

        Raises:
            ConfigError: there are fewer epochs than parts.

        Example:
            >>> [LocalSGD(num_epochs=10).share(k, 4) for k in range(4)]
            [3, 3, 2, 2]
        """
        if self.num_epochs < num_parts:
            raise ConfigError(
                f"{self.num_epochs} local epochs cannot be divided over {num_parts} exchanges",
                where="method.local.num_epochs",
                fix=f"give at least {num_parts}",
            )
        return self.num_epochs // num_parts + (part < self.num_epochs % num_parts)


def train(
    module: nn.Module,
    examples: Examples,
    settings: LocalSGD,
    *,
    rng: Rng,
    device: torch.device,
    num_epochs: int | None = None,
    augment: str = "none",
    validation: Examples | None = None,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Tensor]:
    """Train a module in place; parameters that need no gradient stay.

    Args:
        module: maps ``(n, *input_shape)`` to logits ``(n, num_classes)``, or knows its own objective.
        examples: the training part, in memory; whole batches are cut from it, never single examples.
        settings: how.
        rng: decides the order of examples and the augmentation.
        device: where.
        num_epochs: instead of ``settings.num_epochs``.
        augment: name of the augmentation.
        validation: watched after each epoch where there is any.
        loss: ``(module, x, y)`` to a scalar; the module's own objective, or cross-entropy, if left out.
        progress: called with (epochs done, epochs in all).

    Returns:
        Curves, one value per epoch: ``train_loss`` and, with a validation part, ``validation_loss`` and
        ``validation_accuracy``; in private training only ``epsilon``.

    Raises:
        DataError: there is nothing to train on, or the loss is no longer finite.
    """
    if len(examples) == 0:
        raise DataError("there are no examples to train on", fix="give every client at least one training example")
    total = settings.num_epochs if num_epochs is None else num_epochs
    if settings.privacy is not None:
        check_trains_privately(settings, has_own_loss=loss is not None or isinstance(module, HasObjective))
        return train_privately(
            module,
            examples,
            settings,
            step_rates(settings, len(examples), total),
            rng=rng,
            device=device,
            num_epochs=total,
            augment=augment,
            progress=progress,
        )
    objective = loss or plain_loss
    layout = torch.channels_last if settings.channels_last and examples.x.ndim == 4 else torch.contiguous_format
    module.to(device=device)
    if layout is torch.channels_last:
        module.to(memory_format=layout)  # type: ignore[call-overload]
    run: nn.Module = torch.compile(module) if settings.compile else module  # type: ignore[assignment]
    x, y = examples.x.to(device), examples.y.to(device)
    trainable = [p for p in module.parameters() if p.requires_grad]
    optimizer = _optimizer(trainable, settings)
    rates = iter(step_rates(settings, len(examples), total))
    curves: dict[str, list[float]] = {"train_loss": []}
    best: tuple[float, dict[str, Tensor]] | None = None
    stale = 0
    for epoch in range(total):
        module.train()
        sum_loss, num_seen = torch.zeros((), device=device), 0
        draw = rng.torch("augment", epoch) if augment != "none" else None
        for index in batches(len(examples), settings.batch_size, rng.torch("shuffle", epoch)):
            optimizer.param_groups[0]["lr"] = next(rates)
            batch = x[index.to(device)]
            if draw is not None:
                batch = augment_batch(augment, batch, draw)
            batch = batch.contiguous(memory_format=layout)
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                value = objective(run, batch, y[index.to(device)])
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            if settings.grad_clip_norm is not None:
                nn.utils.clip_grad_norm_(trainable, settings.grad_clip_norm)
            optimizer.step()
            sum_loss += value.detach().float() * len(index)
            num_seen += len(index)
        mean_loss = float(sum_loss) / num_seen
        if not math.isfinite(mean_loss):
            raise DataError(
                f"training diverged: the loss is {mean_loss} in epoch {epoch + 1}",
                fix="lower method.local.learning_rate, or set method.local.grad_clip_norm",
            )
        curves["train_loss"].append(mean_loss)
        progress(epoch + 1, total)
        if validation is not None and len(validation):
            seen = evaluate(module, validation, device=device)
            curves.setdefault("validation_loss", []).append(seen.loss)
            curves.setdefault("validation_accuracy", []).append(seen.accuracy)
            if settings.patience is not None:
                if best is None or seen.loss < best[0]:
                    best, stale = (seen.loss, copy.deepcopy(module.state_dict())), 0
                else:
                    stale += 1
                if stale >= settings.patience:
                    break
    if best is not None:
        module.load_state_dict(best[1])
    module.to(device="cpu")
    return {name: torch.tensor(values) for name, values in curves.items()}


def _optimizer(parameters: list[nn.Parameter], settings: LocalSGD) -> torch.optim.Optimizer:
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=bool(parameters) or None
        )
    return torch.optim.SGD(
        parameters,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        fused=all(p.is_floating_point() for p in parameters) or None,
    )


def step_rates(settings: LocalSGD, num_examples: int, num_epochs: int) -> list[float]:
    """The learning rate of every step of a run that is not stopped early.

    Args:
        settings: how it trains.
        num_examples: of the client, at least 1.
        num_epochs: of the run.

    Returns:
        One rate per step.

    Example:
        >>> step_rates(LocalSGD(batch_size=2, learning_rate=1.0), 5, 2)
        [1.0, 1.0, 1.0, 1.0]
        >>> step_rates(LocalSGD(learning_rate=1.0, schedule="cosine"), 1, 2)
        [1.0, 0.5]
    """
    num_steps = math.ceil(num_examples / settings.batch_size)
    # As :func:`batches` does: a last batch of one example is joined to the one before.
    if settings.batch_size > 1 and num_steps > 1 and num_examples % settings.batch_size == 1:
        num_steps -= 1
    num_steps *= num_epochs
    if settings.schedule == "constant":
        return [settings.learning_rate] * num_steps
    return [settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / num_steps)) for step in range(num_steps)]


def batches(num_examples: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Positions of one shuffled epoch, batch by batch.

    A last batch of a single example is joined to the one before, and one that stays alone is doubled: normalisation
    layers cannot train on one example.

    Args:
        num_examples: at least 1.
        batch_size: at least 1.
        generator: decides the order.

    Yields:
        Positions, shape ``(n,)``.

    Example:
        >>> [len(b) for b in batches(5, 2, torch.Generator())], [len(b) for b in batches(1, 2, torch.Generator())]
        ([2, 3], [2])
    """
    parts = list(torch.randperm(num_examples, generator=generator).split(batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1 and batch_size > 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    for part in parts:
        yield part if len(part) > 1 else part.repeat(2)


def plain_loss(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What a module learns where a method adds nothing: its own objective, or cross-entropy.

    Args:
        module: the module.
        x: inputs, shape ``(n, *input_shape)``.
        y: labels, shape ``(n,)``.

    Returns:
        A scalar, the mean over the batch.
    """
    return module.objective(x, y) if isinstance(module, HasObjective) else F.cross_entropy(module(x).float(), y)
