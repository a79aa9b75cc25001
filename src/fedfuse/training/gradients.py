"""The gradient of a model's objective over many examples."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedfuse.core.examples import Examples
from fedfuse.training.sgd import plain_loss


def mean_gradient(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    examples: Examples,
    *,
    device: torch.device,
    batch_size: int,
) -> dict[str, Tensor]:
    """The gradient with respect to some parameters, averaged over all examples, without dropout.

    Args:
        module: maps inputs to logits, or knows its own objective.
        parameters: by any names; they need gradients and belong to the module.
        examples: at least one.
        device: where.
        batch_size: examples at a time; the result does not depend on it but for rounding.

    Returns:
        Name to gradient on the CPU, float64.
    """
    module.to(device).eval()
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    for x, y in zip(examples.x.split(batch_size), examples.y.split(batch_size), strict=True):
        x, y = x.to(device), y.to(device)
        loss = plain_loss(module, x, y)
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                sums[name] += len(y) * gradient.double()
    module.to("cpu")
    return {name: (total / len(examples)).cpu() for name, total in sums.items()}
