"""What a run of local SGD steps did, and terms that steer one: the maths of methods with many rounds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def gradient_weights(learning_rates: Sequence[float], momentum: float) -> Tensor:
    """How far each gradient of a local run moved the weights.

    SGD with momentum m takes the steps v_t = m v_{t-1} + g_t and w_t = w_{t-1} - r_t v_t, so that the whole run moves
    by the sum of a_t g_t with a_t = r_t + m r_{t+1} + m^2 r_{t+2} + ... (FedNova's vector a_i, times the rate).

    Args:
        learning_rates: r_t of each step.
        momentum: m, in [0, 1).

    Returns:
        a_t, shape ``(num_steps,)``, float64.

    Example:
        >>> gradient_weights([0.5, 0.5, 0.5], 0.0).tolist(), gradient_weights([1.0, 1.0], 0.5).tolist()
        ([0.5, 0.5, 0.5], [1.5, 1.0])
    """
    weights = torch.zeros(len(learning_rates), dtype=torch.float64)
    later = 0.0
    for step in reversed(range(len(learning_rates))):
        later = learning_rates[step] + momentum * later
        weights[step] = later
    return weights


def tilt(parameters: Iterable[Tensor], slopes: Iterable[Tensor]) -> Tensor:
    """A term of a loss whose gradient is the given one and whose value is zero, so that loss curves stay readable.

    Args:
        parameters: what is trained.
        slopes: the gradient, one tensor per parameter, of its shape.

    Returns:
        A scalar.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> term = tilt([w], [torch.tensor([3.0, 4.0])])
        >>> term.item(), torch.autograd.grad(term, w)[0].tolist()
        (0.0, [3.0, 4.0])
    """
    total = torch.stack([(p * slope).sum() for p, slope in zip(parameters, slopes, strict=True)]).sum()
    return total - total.detach()


def squared_distance(parameters: Iterable[Tensor], anchors: Iterable[Tensor]) -> Tensor:
    """Squared Euclidean distance between two lists of tensors.

    Args:
        parameters: what is trained.
        anchors: where from, one tensor per parameter, of its shape.

    Returns:
        A scalar.

    Example:
        >>> squared_distance([torch.tensor([3.0]), torch.tensor([4.0])], [torch.zeros(1), torch.zeros(1)]).item()
        25.0
    """
    return torch.stack([(p - a).square().sum() for p, a in zip(parameters, anchors, strict=True)]).sum()
