"""Images are brought to one size; what is no image is refused."""

from __future__ import annotations

import pytest
import torch

from fedfuse.core.errors import ConfigError
from fedfuse.core.examples import Examples
from fedfuse.data.resizing import resized


def _images(side: int) -> Examples:
    x = torch.arange(float(2 * side * side)).reshape(2, 1, side, side)
    return Examples(x, torch.tensor([0, 1]))


def test_constant_images_stay_constant_and_halving_keeps_the_mean() -> None:
    flat = Examples(torch.full((1, 3, 5, 9), 0.25), torch.tensor([0]))
    assert torch.allclose(resized(flat, 4).x, torch.full((1, 3, 4, 4), 0.25))
    small = resized(_images(8), 4)
    assert small.x.shape == (2, 1, 4, 4)
    assert small.x[0].mean().item() == pytest.approx(_images(8).x[0].mean().item(), rel=1e-3)
    assert small.y.tolist() == [0, 1]


def test_images_of_that_size_are_left_alone() -> None:
    examples = _images(4)
    assert resized(examples, 4) is examples


def test_what_cannot_be_resized() -> None:
    with pytest.raises(ConfigError) as error:
        resized(Examples(torch.zeros(1, 7), torch.tensor([0])), 4)
    assert str(error.value) == (
        "resize is for images, not for inputs of shape (7,)\n  where: data.resize\n  fix:   leave resize out"
    )
    with pytest.raises(ConfigError) as error:
        resized(_images(4), 0)
    assert str(error.value) == (
        "resize must be at least 1, not 0\n  where: data.resize\n  fix:   give the side in pixels"
    )
