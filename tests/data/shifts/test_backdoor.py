from __future__ import annotations

import pytest
import torch

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.data.shifts import NUM_SHAPES, shape_masks, stamp_shapes


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [7, 8, 10, 13, 20])
def test_all_shapes_differ_clearly(size: int) -> None:
    masks = shape_masks(size)
    assert masks.shape == (NUM_SHAPES, size, size)
    assert bool(masks[0].all())
    for i in range(NUM_SHAPES):
        assert masks[i].any()
        for j in range(i):
            assert int((masks[i] ^ masks[j]).sum()) >= size // 2, (i, j)


def test_a_stamp_is_one_shape_in_one_colour_at_one_place() -> None:
    x = torch.full((40, 3, 32, 32), 0.5)
    labels = torch.arange(40) % 10
    stamped = stamp_shapes(x, labels, generator=_generator())
    assert torch.equal(x, torch.full_like(x, 0.5))
    assert float(stamped.min()) >= 0
    assert float(stamped.max()) <= 1
    masks = shape_masks(10)
    for image, label in zip(stamped, labels.tolist(), strict=True):
        changed = (image != 0.5).any(dim=0)
        windows = changed.unfold(0, 10, 1).unfold(1, 10, 1)
        hits = (windows == masks[label]).flatten(2).all(2)
        assert bool(hits.any())
        assert int(changed.sum()) == int(masks[label].sum())
        assert len(torch.unique(image[:, changed], dim=1)[0]) == 1


def test_places_and_colours_vary_and_the_generator_decides() -> None:
    x, labels = torch.zeros(50, 3, 16, 16), torch.zeros(50, dtype=torch.int64)
    one = stamp_shapes(x, labels, generator=_generator(1), size=8)
    assert torch.equal(one, stamp_shapes(x, labels, generator=_generator(1), size=8))
    assert not torch.equal(one, stamp_shapes(x, labels, generator=_generator(2), size=8))
    assert len(torch.unique((one != 0).any(1).flatten(1), dim=0)) > 30
    assert len(torch.unique(one.amax(dim=(2, 3)), dim=0)) == 50


def test_grey_images_and_no_images() -> None:
    assert (
        stamp_shapes(torch.zeros(1, 1, 8, 8), torch.tensor([0]), generator=_generator(), size=8).unique().numel() == 1
    )
    empty = stamp_shapes(torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64), generator=_generator(), size=8)
    assert empty.shape == (0, 3, 8, 8)


def test_what_cannot_be_stamped_is_refused() -> None:
    x, labels = torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])
    with pytest.raises(ConfigError, match="a shape of 10 pixels does not fit into images of 8 x 8"):
        stamp_shapes(x, labels, generator=_generator())
    with pytest.raises(ConfigError, match="size must be at least 7, not 3"):
        shape_masks(3)
    with pytest.raises(ConfigError, match="num_shapes must be from 1 to 10, not 11"):
        stamp_shapes(x, labels, generator=_generator(), size=8, num_shapes=11)
    with pytest.raises(DataError, match="labels go from 0 to 1, but there are 1 shapes"):
        stamp_shapes(x, labels, generator=_generator(), size=8, num_shapes=1)
    with pytest.raises(DataError, match="2 images came with 1 labels"):
        stamp_shapes(x, labels[:1], generator=_generator(), size=8)
    with pytest.raises(DataError, match="shapes are stamped onto images, not onto inputs of shape \\(5,\\)"):
        stamp_shapes(torch.zeros(2, 5), labels, generator=_generator())
