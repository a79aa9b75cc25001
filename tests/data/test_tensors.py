from __future__ import annotations

import numpy as np
import pytest
import torch

from fedfuse.core.errors import DataError
from fedfuse.data.tensors import as_inputs


def test_pixels_are_scaled_and_channels_come_first() -> None:
    x, is_image = as_inputs(np.full((2, 5, 4, 3), 255, dtype=np.uint8), where="t")
    assert is_image
    assert x.shape == (2, 3, 5, 4)
    assert x.unique().tolist() == [1.0]
    x, is_image = as_inputs(torch.full((2, 5, 4), 51), where="t")
    assert is_image
    assert x.shape == (2, 1, 5, 4)
    assert x[0, 0, 0, 0].item() == pytest.approx(0.2)


def test_floating_point_images_and_tables_are_taken_as_they_are() -> None:
    assert as_inputs(torch.full((1, 3, 4, 4), -2.0), where="t")[0].unique().tolist() == [-2.0]
    x, is_image = as_inputs(np.array([[300, 1]]), where="t")
    assert not is_image
    assert x.tolist() == [[300.0, 1.0]]
    assert x.dtype == torch.float32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(3), "the inputs have shape (3,)"),
        (np.array([["a"]]), "the inputs are texts"),
        (np.array([[1j]]), "the inputs have dtype complex128"),
        (torch.tensor([[1j]]), "the inputs are complex numbers"),
        (np.full((1, 2, 2), 256), "the pixels go from 256 to 256"),
        (torch.tensor([[0.0], [float("nan")]]), "the input of example 1 is not finite"),
    ],
)
def test_what_is_no_input_is_refused(values: object, message: str) -> None:
    with pytest.raises(DataError) as error:
        as_inputs(values, where="t")  # type: ignore[arg-type]
    assert error.value.what == message
