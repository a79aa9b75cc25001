"""The two terms of the evidence lower bound of a variational autoencoder."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence from diagonal Gaussians to the standard normal distribution.

    Kingma and Welling, ICLR 2014, appendix B.

    Args:
        mean: shape ``(n, latent_size)``.
        log_variance: of the same shape.

    Returns:
        One value per example, shape ``(n,)``.

    Example:
        >>> gaussian_kl(torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2)).item()
        2.0
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)


def reconstruction_loss(decoded: Tensor, target: Tensor, *, is_pixels: bool) -> Tensor:
    """The negative log likelihood of inputs under what was decoded.

    Args:
        decoded: shape ``(n, ...)``: logits of Bernoulli variables for pixels, else means of Gaussians of variance 1.
        target: of the same shape; pixels in [0, 1].
        is_pixels: which of the two.

    Returns:
        One value per example, shape ``(n,)``; without the constant of the Gaussian.

    Example:
        >>> reconstruction_loss(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 1.0]]), is_pixels=False).item()
        2.0
    """
    if is_pixels:
        loss = F.binary_cross_entropy_with_logits(decoded, target, reduction="none")
    else:
        loss = 0.5 * (decoded - target).square()
    return loss.flatten(1).sum(1)


def truncated_normal(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of which none is farther from 0 than a bound.

    Args:
        shape: of the result.
        bound: above 0.
        generator: decides the numbers; on the CPU.

    Returns:
        Float32.
    """
    drawn: Tensor = torch.nn.init.trunc_normal_(torch.empty(shape), a=-bound, b=bound, generator=generator)
    return drawn
