"""Losses of knowledge distillation and of making images from networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def kd_divergence(student: Tensor, teacher: Tensor, kd_temperature: float = 1.0) -> Tensor:
    """KL divergence from the teacher's softened answers to the student's, times the squared temperature.

    Hinton, Vinyals and Dean, 2015, section 2: the square keeps gradients of one size over temperatures.

    Args:
        student: logits, shape ``(n, num_classes)``.
        teacher: logits of the same shape.
        kd_temperature: above 0.

    Returns:
        One value per example, shape ``(n,)``.

    Example:
        >>> kd_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]), 4.0).item()
        0.0
    """
    target = F.log_softmax(teacher / kd_temperature, 1)
    answer = F.log_softmax(student / kd_temperature, 1)
    return kd_temperature**2 * (target.exp() * (target - answer)).sum(1)


def disagreement(student: Tensor, teacher: Tensor) -> Tensor:
    """Where student and teacher predict different classes.

    Args:
        student: logits, shape ``(n, num_classes)``.
        teacher: logits of the same shape.

    Returns:
        1 where they do, else 0, shape ``(n,)``; no gradient.
    """
    return (student.argmax(1) != teacher.argmax(1)).to(student.dtype)


def jensen_shannon(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Jensen-Shannon divergence between softened answers, in nats.

    DeepInversion, Yin et al., CVPR 2020, section 3.3, where it is what images compete for.

    Args:
        student: logits, shape ``(n, num_classes)``.
        teacher: logits of the same shape.
        temperature: of both softmaxes, above 0.

    Returns:
        One value in [0, ln 2] per example, shape ``(n,)``.

    Example:
        >>> jensen_shannon(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]])).item()
        0.0
    """
    logs = torch.stack([F.log_softmax(logits / temperature, 1) for logits in (student, teacher)])
    # log of the mean of both, from logs: exact where probabilities are too small to be added.
    middle = torch.logsumexp(logs, 0) - math.log(2)
    return 0.5 * (logs.exp() * (logs - middle)).sum((0, 2))


def batch_information(logits: Tensor) -> Tensor:
    """Entropy of a batch's mean prediction, in nats: largest where classes come in equal parts.

    DAFL, Chen et al., ICCV 2019, the information entropy loss without its sign.

    Args:
        logits: shape ``(n, num_classes)``.

    Returns:
        A scalar in [0, ln num_classes].
    """
    mean = logits.softmax(1).mean(0)
    return -(mean * mean.clamp(min=1e-12).log()).sum()


def mean_activation(features: Tensor) -> Tensor:
    """Mean magnitude of features.

    DAFL, Chen et al., ICCV 2019, the activation loss without its sign, and per feature.

    Args:
        features: shape ``(n, ...)``.

    Returns:
        A scalar, 0 or more.
    """
    return features.abs().mean()


def total_variation(images: Tensor) -> Tensor:
    """Mean magnitude of the difference between neighbouring pixels.

    Args:
        images: shape ``(n, channels, height, width)``.

    Returns:
        The mean over vertical neighbours plus that over horizontal ones; a scalar. A side of one pixel counts 0.

    Example:
        >>> total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 3.0]]]])).item()
        3.0
    """
    steps = [images.diff(dim=dim).abs() for dim in (2, 3)]
    return torch.stack([step.mean() if step.numel() else step.sum() for step in steps]).sum()


class _ChannelMoments(torch.autograd.Function):
    """Mean and variance per channel, several times faster than torch.var_mean for the layouts of images."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        # BatchNorm's own kernel computes both in one careful pass.
        ones = torch.ones(x.shape[1], device=x.device)
        _, mean, inverse = torch.native_batch_norm(x, ones, None, None, None, True, 0.0, 0.0)
        ctx.save_for_backward(x, mean)
        # The kernel says 0 for a channel without spread.
        return mean, torch.where(inverse > 0, inverse.square().reciprocal(), 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        of_mean, of_var = gradients
        num_values = x.numel() / x.shape[1]
        slope = 2 / num_values * of_var
        offset = of_mean / num_values - slope * mean
        shape = (1, -1, *[1] * (x.ndim - 2))
        return torch.addcmul(offset.view(shape).to(x.dtype), x, slope.view(shape).to(x.dtype))


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance of each channel.

    Args:
        x: shape ``(n, channels, ...)``, at least two values per channel.

    Returns:
        Two tensors of shape ``(channels,)``, float32; gradients pass.
    """
    found: tuple[Tensor, Tensor] = _ChannelMoments.apply(x)  # type: ignore[no-untyped-call]
    return found


def batchnorm_distance(mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """How far a batch's statistics are from those that a BatchNorm layer remembers.

    DENSE, Zhang et al., NeurIPS 2022, equation 3 (after DeepInversion, Yin et al., CVPR 2020, equation 4).

    Args:
        mean: of the batch, shape ``(channels,)``.
        var: of the batch.
        running_mean: of the layer.
        running_var: of the layer.

    Returns:
        The sum of two Euclidean distances; a scalar.

    Example:
        >>> one = torch.ones(2)
        >>> batchnorm_distance(one, one, one, one).item()
        0.0
        >>> batchnorm_distance(one, one, torch.tensor([4.0, 5.0]), one).item()
        5.0
    """
    return _distance(mean, running_mean) + _distance(var, running_var)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    # The plain norm has no gradient at 0, where the statistics agree.
    square = (a - b).square().sum()
    return torch.where(square > 0, square.clamp(min=1e-24).sqrt(), square)


def hard_sample_cross_entropy(logits: Tensor, labels: Tensor, power: float = 1.0) -> Tensor:
    """Cross-entropy in which examples count the more the less the right class is believed.

    Co-Boosting, Dai et al., ICLR 2024, equation 5; with power 0 it is plain cross-entropy.

    Args:
        logits: shape ``(n, num_classes)``.
        labels: shape ``(n,)``.
        power: of the weight ``1 - p``; 0 or more.

    Returns:
        One value per example, shape ``(n,)``; the weights carry no gradient.
    """
    loss = F.cross_entropy(logits, labels, reduction="none")
    belief = logits.detach().softmax(1).gather(1, labels[:, None])[:, 0]
    return (1 - belief) ** power * loss


def output_diversity_direction(
    x: Tensor, answer: Callable[[Tensor], Tensor], direction: Tensor, temperature: float = 4.0
) -> Tensor:
    """The sign of the gradient of a random mixture of a network's probabilities.

    Output diversified sampling, Tashiro, Song and Ermon, NeurIPS 2020, equation 2.

    Args:
        x: inputs, shape ``(n, ...)``.
        answer: maps inputs to logits ``(n, num_classes)``.
        direction: weights of the mixture, shape ``(n, num_classes)`` or ``(num_classes,)``, in [-1, 1].
        temperature: of the softmax, above 0.

    Returns:
        Entries -1, 0 or 1, shape of ``x``; no gradient.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        mixture = (direction * F.softmax(answer(leaf) / temperature, 1)).sum()
        (gradient,) = torch.autograd.grad(mixture, leaf)
    return gradient.sign()


def boosted_weights(
    weights: Tensor, start: Tensor, logits: Tensor, labels: Tensor, step_size: float, largest_change: float = 1.0
) -> Tensor:
    """One sign-gradient step of ensemble weights towards lower cross-entropy.

    Co-Boosting, Dai et al., ICLR 2024, equation 10; the ensemble's logits are divided by the sum of its weights.

    Args:
        weights: of the members, shape ``(num_members,)``.
        start: weights from which they may move by at most ``largest_change``.
        logits: the members' answers, shape ``(num_members, n, num_classes)``.
        labels: shape ``(n,)``.
        step_size: of the step.
        largest_change: away from ``start``.

    Returns:
        New weights in [0, 1]; the old ones if no member would be left.
    """
    with torch.enable_grad():
        leaf = weights.detach().requires_grad_()
        mixed = torch.einsum("m,mnc->nc", leaf, logits.detach()) / leaf.sum()
        (gradient,) = torch.autograd.grad(F.cross_entropy(mixed, labels), leaf)
    change = (weights - step_size * gradient.sign() - start).clamp(-largest_change, largest_change)
    moved = (start + change).clamp(0, 1)
    return moved if bool(moved.sum() > 0) else weights
