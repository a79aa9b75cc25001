"""What a client must know to turn its normalised inputs into raw ones, which are what images are made of."""

from __future__ import annotations

import torch

from fedfuse.core.examples import InputSpace
from fedfuse.core.payload import Payload


def inputs_message(inputs: InputSpace) -> Payload:
    """What the server says about inputs; no example is in it.

    Args:
        inputs: what inputs look like.
    """
    return Payload(
        {
            "inputs/is_pixels": inputs.is_pixels,
            "inputs/mean": torch.tensor(inputs.mean, dtype=torch.float64),
            "inputs/std": torch.tensor(inputs.std, dtype=torch.float64),
        }
    )


def read_inputs(message: Payload) -> InputSpace:
    """What :func:`inputs_message` said.

    Args:
        message: holds ``inputs/*``.
    """
    return InputSpace(
        tuple(message.tensor("inputs/mean").tolist()),
        tuple(message.tensor("inputs/std").tolist()),
        is_pixels=bool(message["inputs/is_pixels"]),
    )
