from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedfuse.core.errors import DataError
from fedfuse.data.sources.image_folder import ImageFolder

Png = Callable[..., bytes]


def _put(root: Path, name: str, grey: int, png: Png, side: int = 4) -> None:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png(np.full((side, side), grey, dtype=np.uint8)))


def test_classes_come_in_turn(tmp_path: Path, png: Png) -> None:
    for grey, name in enumerate(["train/cat/1.png", "train/cat/2.png", "train/dog/1.PNG", "test/dog/1.png"]):
        _put(tmp_path, name, grey, png)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    data = ImageFolder(path=str(tmp_path), dataset_name="pets").load()
    assert data.class_names == ("cat", "dog")
    assert data.train.y.tolist() == [0, 1, 0]
    assert (data.train.x[:, 0, 0, 0] * 255).round().tolist() == [0, 2, 1]
    assert data.test is not None
    assert data.test.y.tolist() == [1]
    assert data.input_shape == (1, 4, 4)
    assert torch.equal(ImageFolder(path=str(tmp_path)).load(limit=2).train.x, data.train.x[:2])
    assert ImageFolder(path=str(tmp_path), size=2, channels=3).load().input_shape == (3, 2, 2)


def test_without_a_test_folder(tmp_path: Path, png: Png) -> None:
    for grey in range(10):
        _put(tmp_path, f"{'ab'[grey % 2]}/{grey}.png", grey, png)
    with pytest.warns(UserWarning, match="has no test part"):
        assert len(ImageFolder(path=str(tmp_path)).load().train) == 10
    whole = ImageFolder(path=str(tmp_path), test_fraction=0.2).load()
    small = ImageFolder(path=str(tmp_path), test_fraction=0.2).load(limit=3, test_limit=1)
    assert whole.test is not None
    assert len(whole.test) == 2
    assert torch.equal(small.train.x, whole.train.x[:3])


def test_mistakes_are_named(tmp_path: Path, png: Png) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        ImageFolder(path=str(tmp_path / "none")).load()
    with pytest.raises(DataError, match="there are no images"):
        ImageFolder(path=str(tmp_path)).load()
    _put(tmp_path, "train/cat/1.png", 0, png)
    _put(tmp_path, "test/cats/1.png", 0, png)
    with pytest.raises(DataError) as error:
        ImageFolder(path=str(tmp_path)).load()
    assert (error.value.what, error.value.fix) == (
        'the class "cats" has no training images',
        'did you mean "cat"? known: cat',
    )
    (tmp_path / "test" / "cats").rename(tmp_path / "test" / "cat")
    _put(tmp_path, "train/cat/2.png", 0, png, side=5)
    with pytest.raises(DataError, match="image 0 has 4 x 4 pixels and image 1 has 5 x 5"):
        ImageFolder(path=str(tmp_path)).load()
