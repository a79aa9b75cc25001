"""Arrays of a user's own to inputs that models take."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedfuse.core.errors import DataError


def as_inputs(values: Tensor | np.ndarray, *, where: str) -> tuple[Tensor, bool]:
    """Bring inputs to float32 with the channels first.

    Arrays with three or four dimensions are images: ``(n, height, width)`` gets one channel, and
    ``(n, height, width, 1 or 3)`` is turned to channels first. Images of whole numbers are divided by 255; floating
    point numbers are taken as they are.

    Args:
        values: shape ``(n, *input_shape)``.
        where: what error messages call the data.

    Returns:
        The inputs, and whether they are images.

    Raises:
        DataError: they are not numbers, have no feature dimension, or hold values that are not finite.
    """
    x = _tensor(values, where)
    if x.dim() < 2:
        raise DataError(
            f"the inputs have shape {tuple(x.shape)}",
            where=where,
            fix="give each example at least one feature: shape (num_examples, num_features)",
        )
    is_image = x.dim() in (3, 4)
    if is_image:
        x = _channels_first(x)
        if not x.dtype.is_floating_point:
            low, high = (int(x.min()), int(x.max())) if x.numel() else (0, 0)
            if low < 0 or high > 255:
                raise DataError(
                    f"the pixels go from {low} to {high}",
                    where=where,
                    fix="give whole numbers 0 .. 255, or floating point numbers",
                )
            x = x.to(torch.float32) / 255
    x = x.to(torch.float32)
    if not bool(torch.isfinite(x).all()):
        row = int((~torch.isfinite(x.flatten(1)).all(dim=1)).nonzero()[0])
        raise DataError(
            f"the input of example {row} is not finite",
            where=where,
            fix="fill missing values in, or take the example out",
        )
    return x.contiguous(), is_image


def _tensor(values: Tensor | np.ndarray, where: str) -> Tensor:
    if isinstance(values, Tensor):
        x = values.detach().cpu()
        if x.is_complex():
            raise DataError("the inputs are complex numbers", where=where, fix="give real numbers")
        return x.to(torch.uint8) * 255 if x.dtype == torch.bool and x.dim() >= 3 else x
    if values.dtype.kind in "US" or (values.dtype.kind == "O" and any(isinstance(v, str) for v in values.flat)):
        raise DataError("the inputs are texts", where=where, fix="this source reads images and numbers")
    if values.dtype.kind not in "iufb":
        raise DataError(
            f"the inputs have dtype {values.dtype}", where=where, fix="this source reads images and numbers"
        )
    array = values.astype(np.uint8) * 255 if values.dtype.kind == "b" and values.ndim >= 3 else values
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(np.array(array))


def _channels_first(x: Tensor) -> Tensor:
    if x.dim() == 3:
        return x[:, None]
    if x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        return x.permute(0, 3, 1, 2)
    return x
