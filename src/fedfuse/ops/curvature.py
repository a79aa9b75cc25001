"""Fusion of weights by how much each client's data hold them: Fisher information and Gram matrices.

Every solution is the weighted mean of the clients' weights plus a correction. Directions that no client's data hold
get no correction: they keep the mean.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Labels = Literal["all", "sampled", "true"]

_FLATTEST = 1e-8


def logit_gradients(logits: Tensor, targets: Tensor, labels: Labels, generator: torch.Generator) -> Tensor:
    """Gradients of the cross-entropy by the logits whose squares sum to the Fisher information of each example.

    For every class c the gradient is ``p - e_c``; with ``all`` each is scaled by the root of its probability.

    Args:
        logits: shape ``(n, num_classes)``.
        targets: the data's labels, shape ``(n,)``.
        labels: ``all`` classes, one ``sampled`` class per example, or the ``true`` label (the empirical Fisher).
        generator: draws the sampled classes; on the CPU.

    Returns:
        Shape ``(num_classes or 1, n, num_classes)``.

    Example:
        >>> v = logit_gradients(torch.zeros(1, 2), torch.tensor([0]), "all", torch.Generator())
        >>> torch.einsum("cni,cnj->nij", v, v)[0].round(decimals=4).tolist()
        [[0.25, -0.25], [-0.25, 0.25]]
    """
    probabilities = logits.softmax(1)
    num_classes = logits.shape[1]
    if labels == "all":
        gradients = probabilities - torch.eye(num_classes, dtype=logits.dtype, device=logits.device)[:, None]
        # Squares of roots: the sum over classes is the expectation under the model.
        return gradients * probabilities.T[..., None].sqrt()
    if labels == "sampled":
        targets = torch.multinomial(probabilities.cpu(), 1, generator=generator)[:, 0].to(logits.device)
    return (probabilities - F.one_hot(targets, num_classes))[None]


def diagonal_merge(values: Tensor, fishers: Tensor, shares: Tensor, damping: float) -> Tensor:
    """Minimise the shares' sum of ``fisher * (w - value)^2``, with a pull to the mean.

    Args:
        values: shape ``(num_clients, ...)``.
        fishers: diagonals, not negative, of the same shape.
        shares: shape ``(num_clients,)``, sums to 1.
        damping: strength of the pull, relative to the mean of the summed diagonal, 0 or more.

    Returns:
        Shape ``(...)``.

    Example:
        >>> values, fishers = torch.tensor([[0.0], [4.0]]), torch.tensor([[3.0], [1.0]])
        >>> diagonal_merge(values, fishers, torch.tensor([0.5, 0.5]), 0.0).item()
        1.0
    """
    mean = torch.tensordot(shares, values, 1)
    total = torch.tensordot(shares, fishers, 1)
    push = torch.tensordot(shares, fishers * (values - mean), 1)
    held = total + damping * (total.mean() if total.numel() else 0.0)
    merged: Tensor = mean + torch.where(held > 0, push / held.clamp(min=torch.finfo(held.dtype).tiny), 0.0)
    return merged


def kronecker_merge(
    values: Tensor,
    inputs: Tensor,
    gradients: Tensor,
    shares: Tensor,
    damping: float,
    *,
    num_iterations: int = 200,
    tolerance: float = 1e-8,
) -> Tensor:
    """Minimise the shares' sum of ``(w - w_i)' (A_i x G_i) (w - w_i)``, with a pull to the mean.

    Solved by conjugate gradients from the mean, preconditioned by the product of the mean factors.

    Args:
        values: weights of one layer, shape ``(num_clients, d_out, d_in)``.
        inputs: A_i, shape ``(num_clients, d_in, d_in)``.
        gradients: G_i, shape ``(num_clients, d_out, d_out)``.
        shares: shape ``(num_clients,)``, sums to 1.
        damping: strength of the pull, relative to the mean eigenvalue of the summed curvature, 0 or more.
        num_iterations: most steps.
        tolerance: stop when the residual is this small, relative to the first one.

    Returns:
        Shape ``(d_out, d_in)``.
    """
    mean: Tensor = torch.tensordot(shares, values, 1)
    scaled = shares[:, None, None] * gradients
    traces = scaled.diagonal(dim1=1, dim2=2).mean(1) * inputs.diagonal(dim1=1, dim2=2).mean(1)
    pull = damping * traces.sum()
    residual = (scaled @ (values - mean) @ inputs).sum(0)
    correction: Tensor = torch.zeros_like(mean)
    # The product of the mean factors is near to the sum of the products, and its inverse is two decompositions.
    by_output, output_axes = torch.linalg.eigh(scaled.sum(0))
    by_input, input_axes = torch.linalg.eigh(torch.tensordot(shares, inputs, 1))
    spectrum = torch.outer(by_output.clamp(min=0), by_input.clamp(min=0)) + pull
    spectrum = spectrum.clamp(min=_FLATTEST * float(spectrum.max()) or 1.0)

    def conditioned(gradient: Tensor) -> Tensor:
        turned: Tensor = output_axes @ ((output_axes.T @ gradient @ input_axes) / spectrum) @ input_axes.T
        return turned

    direction = step = conditioned(residual)
    energy, first = (residual * step).sum(), residual.square().sum()
    for _ in range(num_iterations):
        if residual.square().sum() <= tolerance**2 * first:
            break
        image = (scaled @ direction @ inputs).sum(0) + pull * direction
        curvature = (direction * image).sum()
        # Rounding may leave a direction that nothing holds; there is no way down along it.
        if curvature <= 0:
            break
        length = energy / curvature
        correction = correction + length * direction
        residual = residual - length * image
        step = conditioned(residual)
        energy, before = (residual * step).sum(), energy
        direction = step + energy / before * direction
    return mean + correction


def scale_off_diagonal(grams: Tensor, factor: float) -> Tensor:
    """Multiply all but the diagonal.

    Args:
        grams: shape ``(..., d, d)``.
        factor: 1 changes nothing, 0 leaves the diagonal.

    Returns:
        The same shape.
    """
    return factor * grams + (1 - factor) * torch.diag_embed(grams.diagonal(dim1=-2, dim2=-1))


def gram_merge(values: Tensor, grams: Tensor, shares: Tensor, *, rcond: float = 1e-6) -> Tensor:
    """Minimise the shares' sum of ``|X_i (W - W_i)'|^2``: outputs as near as can be to each client's on its inputs.

    Args:
        values: weights of one layer, shape ``(num_clients, d_out, d_in)``.
        grams: X_i' X_i, shape ``(num_clients, d_in, d_in)``.
        shares: shape ``(num_clients,)``, sums to 1.
        rcond: directions with less than this part of the largest eigenvalue keep the mean.

    Returns:
        Shape ``(d_out, d_in)``.
    """
    mean: Tensor = torch.tensordot(shares, values, 1)
    total = torch.tensordot(shares, grams, 1)
    push = torch.tensordot(shares, (values - mean) @ grams, 1)
    eigenvalues, vectors = torch.linalg.eigh(total)
    is_held = eigenvalues > rcond * eigenvalues[-1].clamp(min=0)
    inverse = torch.where(is_held, 1 / torch.where(is_held, eigenvalues, 1.0), 0.0)
    correction: Tensor = (push @ vectors * inverse) @ vectors.T
    return mean + correction
