"""How a loss bends: slopes, the largest curvature, and short sketches of long vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Loss = Callable[[], Tensor]
"""The loss at the parameters' present values; the same number every time it is called."""


@dataclass(frozen=True)
class Curvature:
    """The largest curvature of a loss.

    Args:
        value: the eigenvalue of the Hessian that is largest in absolute value: the smoothness L is its size.
        num_steps: of the power iteration.
        has_settled: whether the last step changed it by less than the tolerance.
    """

    value: float
    num_steps: int
    has_settled: bool


def slope(loss: Loss, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of a loss.

    Args:
        loss: what is looked at.
        parameters: need gradients.

    Returns:
        One tensor per parameter; zeros where the loss does not depend on it.

    Example:
        >>> w = torch.tensor([3.0], requires_grad=True)
        >>> slope(lambda: (w**2).sum(), [w])
        [tensor([6.])]
    """
    return _derivative([loss()], parameters, [None], keep=False)


def largest_curvature(
    loss: Loss,
    parameters: Sequence[Tensor],
    *,
    generator: torch.Generator,
    num_steps: int = 20,
    tolerance: float = 0.01,
) -> Curvature:
    """The Hessian's eigenvalue of the largest size, by power iteration with Hessian-vector products.

    The Hessian is never formed: a step costs about two passes backward.

    Args:
        loss: what is looked at; twice differentiable.
        parameters: need gradients.
        generator: draws the first direction; on the CPU.
        num_steps: most steps, at least 1.
        tolerance: stop when a step changes the value by less than this part of it.

    Returns:
        How much the Hessian stretched the last direction, with the sign of the curvature along it. The size is right
        also where two eigenvalues are as large and of opposite sign, as they are where LoRA begins; the sign is then
        either.

    Example:
        >>> w = torch.ones(2, requires_grad=True)
        >>> found = largest_curvature(lambda: w[0] ** 2 - 4 * w[1] ** 2, [w], generator=torch.Generator())
        >>> round(found.value, 2), found.has_settled
        (-8.0, True)
    """
    # Fused attention has no second derivative; the plain one has.
    with sdpa_kernel(SDPBackend.MATH):
        slopes = _derivative([loss()], parameters, [None], keep=True)
        bent = [s for s in slopes if s.requires_grad]
        is_bent = [s.requires_grad for s in slopes]
        if not bent:
            return Curvature(0.0, 0, True)
        direction = [torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p) for p in parameters]
        value = 0.0
        for step in range(num_steps):
            size = length(direction)
            direction = [d / size for d in direction]
            seeds = [d for d, keeps in zip(direction, is_bent, strict=True) if keeps]
            image = _derivative(bent, parameters, seeds, keep=True, last=step + 1 == num_steps)
            before, value = value, math.copysign(length(image), inner(direction, image))
            if value == 0:
                return Curvature(0.0, step + 1, True)
            if step and abs(abs(value) - abs(before)) <= tolerance * abs(value):
                return Curvature(value, step + 1, True)
            direction = image
    return Curvature(value, num_steps, False)


def inner(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """The inner product of two vectors that are kept in pieces.

    Args:
        first: pieces.
        second: pieces of the same shapes.

    Example:
        >>> inner([torch.tensor([1.0, 2.0]), torch.tensor(3.0)], [torch.tensor([4.0, 5.0]), torch.tensor(6.0)])
        32.0
    """
    return float(sum((a.double() * b.double()).sum().item() for a, b in zip(first, second, strict=True)))


def length(vector: Sequence[Tensor]) -> float:
    """The Euclidean length of a vector that is kept in pieces.

    Args:
        vector: pieces.

    Example:
        >>> length([torch.tensor([3.0]), torch.tensor([4.0])])
        5.0
    """
    return float(inner(vector, vector) ** 0.5)


def sketch(vector: Sequence[Tensor], size: int, generator: torch.Generator) -> Tensor:
    """A short vector whose sums, lengths and inner products tell those of long ones (a count sketch).

    Every element is added, with a random sign, to one of ``size`` places. A squared length is right on average, with a
    relative spread of the square root of ``2 / size`` at most. Sketches made with generators of the same seed can be
    added.

    Args:
        vector: pieces.
        size: of the sketch, at least 1.
        generator: draws places and signs; on the CPU.

    Returns:
        Shape ``(size,)``, float32.

    Example:
        >>> short = sketch([torch.tensor([3.0]), torch.tensor([0.0])], 8, torch.Generator().manual_seed(0))
        >>> short.shape, short.abs().sum().item()
        (torch.Size([8]), 3.0)
    """
    total = torch.zeros(size, dtype=torch.float64)
    for piece in vector:
        values = piece.detach().reshape(-1).to("cpu", torch.float64)
        drawn = torch.randint(0, 2 * size, (len(values),), generator=generator)
        total.index_add_(0, drawn // 2, torch.where(drawn % 2 == 0, values, -values))
    return total.float()


def _derivative(
    outputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    seeds: Sequence[Tensor | None],
    *,
    keep: bool,
    last: bool = False,
) -> list[Tensor]:
    found = torch.autograd.grad(
        outputs,
        parameters,
        seeds,
        create_graph=keep and seeds[0] is None,
        retain_graph=keep and not last,
        materialize_grads=True,
    )
    return list(found)
