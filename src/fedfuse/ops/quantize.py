"""Weights in eight bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_LARGEST = 127


def to_int8(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Round weights to int8, symmetric, with one scale per row (output channel).

    Args:
        weights: floating point, shape ``(num_rows, ...)``, at least two dimensions.

    Returns:
        Codes of the same shape, int8, and scales ``(num_rows,)``, float32; the error is at most half a scale.

    Example:
        >>> codes, scales = to_int8(torch.tensor([[1.27, -0.5], [0.0, 0.0]]))
        >>> codes.tolist(), [round(s, 6) for s in scales.tolist()]
        ([[127, -50], [0, 0]], [0.01, 0.0])
    """
    rows = weights.detach().float().flatten(1)
    scales = rows.abs().amax(1) / _LARGEST
    codes = (rows / torch.where(scales > 0, scales, 1.0)[:, None]).round().clamp(-_LARGEST, _LARGEST)
    return codes.to(torch.int8).view(weights.shape), scales


def from_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """Turn codes back into weights.

    Args:
        codes: int8, shape ``(num_rows, ...)``.
        scales: shape ``(num_rows,)``.

    Returns:
        Float32, the shape of the codes.
    """
    return (codes.float().flatten(1) * scales[:, None]).view(codes.shape)


def pack_int8(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict whose matrices and kernels are in int8; biases and buffers stay as they are.

    Args:
        state: name to tensor.

    Returns:
        The tensors, and the scales of those in int8 by the same names.
    """
    tensors, scales = dict(state), {}
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.ndim >= 2 and tensor.numel():
            tensors[name], scales[name] = to_int8(tensor)
    return tensors, scales


def unpack_int8(tensors: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo :func:`pack_int8`, but for the rounding.

    Args:
        tensors: what it gave.
        scales: what it gave; empty where nothing was packed.

    Returns:
        Name to tensor.
    """
    return {name: from_int8(t, scales[name]) if name in scales else t for name, t in tensors.items()}
