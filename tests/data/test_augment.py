from __future__ import annotations

import pytest
import torch

from fedfuse.core.errors import ConfigError
from fedfuse.core.examples import Examples
from fedfuse.data.augment import AUGMENTATIONS, augment_batch, check_augment, default_augment
from fedfuse.data.dataset import Dataset


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _images(*shape: int, is_image: bool = True) -> Dataset:
    return Dataset(Examples(torch.zeros(2, *shape), torch.tensor([0, 1])), None, ("a", "b"), is_image=is_image)


def test_auto_is_for_photos() -> None:
    assert default_augment(_images(3, 32, 32)) == "crop_flip"
    assert default_augment(_images(3, 24, 24)) == "crop_flip"
    assert [default_augment(d) for d in (_images(3, 16, 16), _images(1, 28, 28), _images(5, is_image=False))] == [
        "none"
    ] * 3


def test_none_is_the_same_tensor() -> None:
    x = torch.rand(3, 7)
    assert augment_batch("none", x, _generator()) is x


def test_flip_mirrors_about_half_of_the_images() -> None:
    x = torch.arange(3.0).expand(1000, 1, 2, 3)
    out = augment_batch("flip", x, _generator())
    is_flipped = (out == x.flip(3)).flatten(1).all(1)
    assert bool(((out == x).flatten(1).all(1) | is_flipped).all())
    assert 430 < int(is_flipped.sum()) < 570


def test_a_crop_is_a_window_of_the_padded_image() -> None:
    x = torch.rand(400, 2, 6, 5) + 0.1
    out = augment_batch("crop", x, _generator())
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    windows = padded.unfold(2, 6, 1).unfold(3, 5, 1)  # (n, c, 9, 9, 6, 5)
    is_window = (windows == out[:, :, None, None]).all(dim=1).flatten(3).all(dim=3)
    assert bool(is_window.flatten(1).any(1).all())
    # All 9 offsets of each axis are drawn, and images move on their own.
    assert bool(is_window.any(0).any(0).all())
    assert bool(is_window.any(0).any(1).all())


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_the_generator_decides(name: str) -> None:
    x = torch.rand(8, 3, 9, 9)
    kept = x.clone()
    assert torch.equal(augment_batch(name, x, _generator(1)), augment_batch(name, x, _generator(1)))
    assert torch.equal(x, kept)
    assert name == "none" or not torch.equal(
        augment_batch(name, x, _generator(1)), augment_batch(name, x, _generator(2))
    )


def test_wrong_names_and_shapes() -> None:
    with pytest.raises(ConfigError) as error:
        check_augment("cropflip")
    assert str(error.value) == (
        'there is no augmentation "cropflip"\n  where: augment\n'
        '  fix:   did you mean "crop_flip"? known: auto, crop, crop_flip, flip, none'
    )
    with pytest.raises(ConfigError, match='the augmentation "flip" is for images, not for inputs of shape \\(7,\\)'):
        augment_batch("flip", torch.zeros(2, 7), _generator())
