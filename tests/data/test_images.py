from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.data.images import check_image_settings, decode_images, to_unit_range

GREY = np.array([[0, 51], [102, 255]], dtype=np.uint8)
COLOUR = np.stack([GREY, GREY // 2, GREY * 0], axis=2)


def test_grey_and_colour_come_back_exactly(png: Callable[..., bytes]) -> None:
    grey = decode_images([png(GREY)])
    assert grey.dtype == torch.uint8
    assert grey.tolist() == [[GREY.tolist()]]
    assert decode_images([png(COLOUR)])[0].tolist() == COLOUR.transpose(2, 0, 1).tolist()
    assert to_unit_range(grey).flatten().tolist() == pytest.approx([0, 0.2, 0.4, 1])


def test_grey_joins_colour(png: Callable[..., bytes]) -> None:
    mixed = decode_images([png(GREY), png(COLOUR)])
    assert mixed.shape == (2, 3, 2, 2)
    assert mixed[0].tolist() == [GREY.tolist()] * 3
    assert decode_images([png(GREY)], channels=3).shape == (1, 3, 2, 2)
    assert decode_images([png(COLOUR)], channels=1).shape == (1, 1, 2, 2)


def test_sixteen_bits_become_eight(png: Callable[..., bytes]) -> None:
    assert decode_images([png(np.array([[0, 256, 65535]], dtype=np.uint16))]).flatten().tolist() == [0, 1, 255]


def test_sizes_must_agree_or_be_set(png: Callable[..., bytes], tmp_path: Path) -> None:
    items = [png(GREY), png(np.zeros((3, 5), dtype=np.uint8))]
    with pytest.raises(DataError) as error:
        decode_images(items, where="here")
    assert str(error.value) == (
        "image 0 has 2 x 2 pixels and image 1 has 3 x 5\n  where: here\n  fix:   set size to resize them all"
    )
    assert decode_images(items, size=4).shape == (2, 1, 4, 4)


def test_a_broken_image_is_named(png: Callable[..., bytes], tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        decode_images([png(GREY), b"nonsense"], where="part")
    assert (error.value.what, error.value.where) == ("an image cannot be read: UnidentifiedImageError", "part, row 1")
    file = tmp_path / "a.png"
    file.write_bytes(png(np.zeros((64, 64), dtype=np.uint8))[:60])
    with pytest.raises(DataError, match="an image cannot be read") as error:
        decode_images([file])
    assert error.value.where == str(file)
    with pytest.raises(DataError, match="there are no images"):
        decode_images([])


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="channels must be 1 or 3, not 2"):
        check_image_settings(None, 2)
    with pytest.raises(ConfigError, match="size must be at least 1, not 0"):
        check_image_settings(0, None)
