"""Local training by loss differences alone: no gradient is computed and no activation is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.examples import Examples
from fedfuse.core.seeding import Rng
from fedfuse.ops.zeroth_order import shift
from fedfuse.training.sgd import plain_loss

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True)
class LocalZerothOrder:
    """How a client trains without gradients.

    Args:
        num_steps: steps in the whole run, at least 1. A method with several exchanges divides them.
        batch_size: examples per step, at least 1.
        learning_rate: above 0; the more parameters are trained, the smaller: 0.01 for thousands, 1e-6 for billions.
        perturbation: epsilon in the paper, above 0: how far the loss is looked at on either side.
        slope_clip: largest magnitude of a slope; ``None`` does not clip.
    """

    num_steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 5e-3
    perturbation: float = 1e-3
    slope_clip: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} is {value}", where=f"local.{name}", fix="give at least 1")
        for name in ("learning_rate", "perturbation", "slope_clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value:g}", where=f"local.{name}", fix="give a number above 0")

    def share(self, part: int, num_parts: int) -> int:
        """Steps of one of several exchanges; the first ones get what does not divide evenly.

        Args:
            part: 0 to ``num_parts - 1``.
            num_parts: exchanges that train.

        Returns:
            Steps of that part; the parts add up to ``num_steps``.

        Raises:
            ConfigError: there are fewer steps than parts.

        Example:
            >>> [LocalZerothOrder(num_steps=10).share(k, 4) for k in range(4)]
            [3, 3, 2, 2]
        """
        if self.num_steps < num_parts:
            raise ConfigError(
                f"{self.num_steps} local steps cannot be divided over {num_parts} exchanges",
                where="method.local.num_steps",
                fix=f"give at least {num_parts}",
            )
        return self.num_steps // num_parts + (part < self.num_steps % num_parts)


@dataclass(frozen=True)
class Slopes:
    """What a client found along the directions that it took.

    Args:
        sums: sum of the slopes of every direction, float64, shape ``(num_seeds,)``.
        sizes: sum of their magnitudes.
        counts: how often it was taken.
        losses: mean loss of every step, shape ``(num_steps,)``.
    """

    sums: Tensor
    sizes: Tensor
    counts: Tensor
    losses: Tensor


def train_without_gradients(
    module: nn.Module,
    examples: Examples,
    settings: LocalZerothOrder,
    *,
    num_steps: int,
    probabilities: Tensor,
    directions: Rng,
    rng: Rng,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Slopes:
    """Train a module in place by steps along given directions.

    Each step takes a direction z at random, finds the slope g = (L(w + eps z) - L(w - eps z)) / (2 eps) on a batch, and
    goes to w - lr g z: weights are moved in place, so memory is that of inference.

    Args:
        module: its parameters that need a gradient are trained.
        examples: at least one.
        settings: how.
        num_steps: of this exchange.
        probabilities: of each direction, shape ``(num_seeds,)``.
        directions: where all directions come from; the same for everyone.
        rng: decides batches and directions.
        device: where.
        progress: called with (steps done, steps in all).

    Returns:
        The slopes, from which the trained weights can be made again.

    Raises:
        DataError: there is nothing to train on, or the loss is no longer finite.
    """
    if len(examples) == 0:
        raise DataError("there are no examples to train on", fix="give every client at least one training example")
    module.to(device).train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.contiguous()
    x, y = examples.x.to(device), examples.y.to(device)
    epsilon = settings.perturbation
    sums, sizes = torch.zeros(len(probabilities)).double(), torch.zeros(len(probabilities)).double()
    counts, losses = torch.zeros(len(probabilities), dtype=torch.int64), torch.zeros(num_steps)
    chosen = torch.multinomial(probabilities.double(), num_steps, replacement=True, generator=rng.torch("directions"))
    devices = [device] if device.type == "cuda" else []
    for step, number in enumerate(chosen.tolist()):
        index = torch.randperm(len(examples), generator=rng.torch("batch", step))[: settings.batch_size]
        # Normalisation layers cannot train on one example.
        index = (index if len(index) > 1 else index.repeat(2)).to(device)
        with torch.no_grad():
            shift(parameters, directions, number, epsilon)
            # Both sides see the same dropout.
            with torch.random.fork_rng(devices):
                above = _loss(module, x[index], y[index])
            shift(parameters, directions, number, -2 * epsilon)
            below = _loss(module, x[index], y[index])
            slope = (above - below) / (2 * epsilon)
            if not abs(slope) + abs(above) < _LARGEST:
                raise DataError(
                    f"training diverged: the losses are {above:g} and {below:g} in step {step + 1}",
                    fix="lower method.local.learning_rate, or set method.local.slope_clip",
                )
            if settings.slope_clip is not None:
                slope = max(-settings.slope_clip, min(settings.slope_clip, slope))
            # What travels has the precision of float32.
            slope = torch.tensor(slope, dtype=torch.float32).item()
            shift(parameters, directions, number, epsilon - settings.learning_rate * slope)
        sums[number] += slope
        sizes[number] += abs(slope)
        counts[number] += 1
        losses[step] = (above + below) / 2
        progress(step + 1, num_steps)
    module.to(device="cpu")
    return Slopes(sums, sizes, counts, losses)


def _loss(module: nn.Module, x: Tensor, y: Tensor) -> float:
    loss = plain_loss(module, x, y)
    return loss.item()
