from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.data.sources.npz import Npz


def _save(tmp_path: Path, **arrays: Any) -> str:
    np.savez(tmp_path / "d.npz", **arrays)
    return str(tmp_path / "d.npz")


def test_images_and_tables(tmp_path: Path) -> None:
    path = _save(
        tmp_path,
        x=np.full((4, 5, 6, 3), 255, dtype=np.uint8),
        y=np.array([[3], [5], [3], [5]]),
        x_test=np.zeros((1, 5, 6, 3), dtype=np.uint8),
        y_test=np.array([[5]]),
    )
    data = Npz(path=path).load()
    assert data.input_shape == (3, 5, 6)
    assert data.is_image
    assert data.class_names == ("3", "5")
    assert data.name == "d"
    assert data.train.y.tolist() == [0, 1, 0, 1]
    assert data.test is not None
    assert data.test.y.tolist() == [1]
    path = _save(tmp_path, a=np.arange(40.0).reshape(20, 2), b=np.arange(20) % 2)
    table = Npz(path=path, x_key="a", y_key="b", test_fraction=0.1).load(limit=5)
    assert not table.is_image
    assert len(table.train) == 5
    assert len(table.test or ()) == 2


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        Npz(path=str(tmp_path / "none.npz")).load()
    with pytest.raises(ConfigError) as error:
        Npz(path=_save(tmp_path, x_train=np.zeros((1, 1)), y=np.zeros(1))).load()
    assert (error.value.what, error.value.fix) == ('x_key: there is no array "x"', "known: x_train, y")
    with pytest.raises(ConfigError, match='y_test_key: there is no array "y_test"'):
        Npz(path=_save(tmp_path, x=np.zeros((1, 1)), y=np.zeros(1), x_test=np.zeros((1, 1)))).load()
    with pytest.raises(DataError, match="2 inputs came with 1 labels"):
        Npz(path=_save(tmp_path, x=np.zeros((2, 1)), y=np.zeros(1)), test_fraction=0.5).load()
    with pytest.raises(DataError, match="the archive cannot be read: it holds pickled objects"):
        Npz(path=_save(tmp_path, x=np.array([[object()]], dtype=object), y=np.zeros(1))).load()
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(DataError, match="the archive cannot be read"):
        Npz(path=str(tmp_path / "bad.npz")).load()
    np.save(tmp_path / "lone.npy", np.zeros(3))
    with pytest.raises(DataError, match="this is a single array"):
        Npz(path=str(tmp_path / "lone.npy")).load()
