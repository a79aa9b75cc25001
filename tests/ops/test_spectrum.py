"""Mixing amplitudes and cutting boxes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedfuse.ops.spectrum import cut_boxes, mix_amplitudes, random_boxes


def images(n: int = 3, side: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(n, 2, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("side", [7, 8])
def test_a_weight_of_zero_is_the_identity(side: int) -> None:
    x = images(side=side)
    torch.testing.assert_close(mix_amplitudes(x, images(side=side, seed=1), 0.0), x, rtol=1e-5, atol=1e-6)


@given(weight=st.floats(0, 1), seed=st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_phases_stay_and_amplitudes_are_the_weighted_mean(weight: float, seed: int) -> None:
    x, other = images(seed=seed), images(seed=seed + 100)
    before, others = torch.fft.fft2(x), torch.fft.fft2(other)
    after = torch.fft.fft2(mix_amplitudes(x, other, weight))
    torch.testing.assert_close(after.abs(), (1 - weight) * before.abs() + weight * others.abs(), rtol=1e-3, atol=1e-3)
    cosine = torch.cos(after.angle() - before.angle())
    # Where an amplitude is next to nothing its phase means nothing.
    assert float(cosine[after.abs() > 1e-2].min()) > 0.999


def test_a_constant_image_takes_the_others_brightness() -> None:
    # The spectrum of a constant image is its mean alone: 0.8 * 0.5 + 0.2 * 1.
    mixed = mix_amplitudes(torch.ones(1, 1, 4, 4), torch.full((1, 1, 4, 4), 0.5), 0.8)
    torch.testing.assert_close(mixed, torch.full((1, 1, 4, 4), 0.6))


def test_the_whole_box_cuts_nothing() -> None:
    boxes = random_boxes(3, 1.0, torch.Generator().manual_seed(0))
    # An area of 1 with other sides than 1 is cut to the image.
    assert bool((boxes[:, 2:] <= 1).all())
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(3, 1)
    torch.testing.assert_close(cut_boxes(images(), whole), images(), rtol=1e-5, atol=1e-6)


def test_half_a_box_is_that_half_stretched() -> None:
    x = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    # The left half: pixels 0 and 1 at twice their width.
    left = cut_boxes(x, torch.tensor([[-0.5, 0.0, 0.5, 1.0]]))
    torch.testing.assert_close(left[0, 0, 0], torch.tensor([0.0, 0.25, 0.75, 1.25]))


@given(smallest=st.floats(0.05, 1.0), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_boxes_lie_inside_and_keep_their_area(smallest: float, seed: int) -> None:
    x, y, half_width, half_height = random_boxes(20, smallest, torch.Generator().manual_seed(seed)).unbind(1)
    assert bool((x.abs() + half_width <= 1 + 1e-5).all())
    assert bool((y.abs() + half_height <= 1 + 1e-5).all())
    is_free = (half_width < 1) & (half_height < 1)
    assert bool(((half_width * half_height)[is_free] >= smallest - 1e-5).all())
    assert bool((half_width / half_height <= 4 / 3 + 1e-4).all())
