from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.registry import SOURCES
from fedfuse.core.settings import from_json
from fedfuse.data import images
from fedfuse.data.sources.parquet import Parquet

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def _write(path: Path, features: dict[str, Any] | None = None, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)


@pytest.fixture
def image_set(tmp_path: Path, png: Callable[..., bytes]) -> Path:
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog", "owl"]}}
    for part, start, rows in (
        ("train-00000-of-00002", 0, 3),
        ("train-00001-of-00002", 3, 2),
        ("test-00000-of-00001", 5, 2),
    ):
        values = [
            {"bytes": png(np.full((2, 2), row, dtype=np.uint8)), "path": None} for row in range(start, start + rows)
        ]
        writers = [f"w{row % 2}" for row in range(rows)]
        _write(
            tmp_path / "pets" / f"{part}.parquet",
            features,
            image=values,
            label=[row % 2 for row in range(rows)],
            writer=writers,
        )
    return tmp_path / "pets"


def test_images_come_in_file_order_with_the_names_of_their_classes(image_set: Path) -> None:
    data = Parquet(path=str(image_set)).load()
    assert (data.train.x[:, 0, 0, 0] * 255).round().tolist() == [0, 1, 2, 3, 4]
    assert data.test is not None
    assert len(data.test) == 2
    assert data.class_names == ("cat", "dog", "owl")
    assert data.is_image
    assert data.name == "pets"
    assert data.columns["writer"].tolist() == ["w0", "w1", "w0", "w0", "w1"]
    assert data.input_shape == (1, 2, 2)


def test_a_limit_is_the_first_rows_and_decodes_no_more(image_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    real = images.decode_images
    monkeypatch.setattr(images, "decode_images", lambda items, **rest: counts.append(len(items)) or real(items, **rest))
    source = Parquet(path=str(image_set))
    small, whole = source.load(limit=4, test_limit=1), source.load()
    assert counts == [4, 1, 5, 2]
    for a, b in ((small.train, whole.limited(4, 1).train), (small.test, whole.limited(4, 1).test)):
        assert a is not None
        assert b is not None
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.y, b.y)
    assert small.columns["writer"].tolist() == whole.columns["writer"][:4].tolist()
    source.load(limit=4, test_limit=1)
    source.load(limit=100)
    assert counts == [4, 1, 5, 2]
    Parquet(path=str(image_set), size=3).load()
    assert counts == [4, 1, 5, 2, 5, 2]


def test_a_damaged_cache_is_made_anew(image_set: Path, own_cache: Path) -> None:
    before = Parquet(path=str(image_set)).load()
    files = list(own_cache.rglob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        file.write_bytes(b"broken")
    assert torch.equal(Parquet(path=str(image_set)).load().train.x, before.train.x)


def test_layouts(image_set: Path, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    image_set.rename(tmp_path / "hub" / "data")
    assert len(Parquet(path=str(tmp_path / "hub")).load().train) == 5
    train, test = (
        tmp_path / "hub" / "data" / f"{name}.parquet" for name in ("train-00000-of-00002", "test-00000-of-00001")
    )
    data = Parquet(path=str(train), test_path=str(test), dataset_name="mine").load()
    assert (len(data.train), len(data.test or ()), data.name) == (3, 2, "mine")
    with pytest.warns(UserWarning, match="has no test part"):
        assert Parquet(path=str(train)).load().test is None


def test_tables_split_off_a_test_part_before_any_limit(tmp_path: Path) -> None:
    file = tmp_path / "wine.parquet"
    _write(file, a=np.arange(20.0), b=np.arange(20), label=["red", "white"] * 10, site=["s"] * 20)
    data = Parquet(path=str(file), test_fraction=0.2, ignore_columns=("site",)).load()
    assert data.test is not None
    assert (len(data.train), len(data.test)) == (16, 4)
    assert data.class_names == ("red", "white")
    assert data.input_shape == (2,)
    assert not data.is_image
    assert set(data.columns) == {"a", "b", "site"}
    small = Parquet(path=str(file), test_fraction=0.2, ignore_columns=("site",)).load(limit=3, test_limit=2)
    assert torch.equal(small.train.x, data.train.x[:3])
    assert torch.equal(small.test.x, data.test.x[:2])


def test_lists_of_numbers_are_features(tmp_path: Path) -> None:
    _write(tmp_path / "train.parquet", embedding=[[1.0, 2.0], [3.0, 4.0]], y=[7, 5])
    _write(tmp_path / "test.parquet", embedding=[[5.0, 6.0]], y=[5])
    data = Parquet(path=str(tmp_path)).load()
    assert data.train.x.tolist() == [[1, 2], [3, 4]]
    assert data.train.y.tolist() == [1, 0]
    assert data.class_names == ("5", "7")


@pytest.mark.parametrize(
    ("columns", "settings", "error", "message"),
    [
        ({"text": ["a"], "label": [0]}, {}, DataError, 'the column "text" holds texts'),
        ({"prompt": ["a"], "answer": ["b"]}, {}, DataError, "there is no label column, and prompt, answer hold texts"),
        ({"a": [1.0], "kind": [0]}, {}, ConfigError, "no column is called label, target, class or y"),
        (
            {"a": [1.0], "label": [0]},
            {"label_column": "lable"},
            ConfigError,
            'label_column: there is no column "lable"',
        ),
        ({"a": [1.0], "label": [0]}, {"image_column": "img"}, ConfigError, 'image_column: there is no column "img"'),
        ({"a": [1.0], "label": [0]}, {"ignore_columns": ("b",)}, ConfigError, 'ignore_columns: there is no column "b"'),
        ({"a": [1.0, None], "label": [0, 1]}, {}, DataError, 'the column "a" has no value in row 1'),
        ({"image": [b"x"], "label": [0]}, {}, DataError, "an image cannot be read: UnidentifiedImageError"),
        (
            {"a": [[1.0], [1.0, 2.0]], "label": [0, 1]},
            {},
            DataError,
            'the column "a" holds lists that are not equally long lists of numbers',
        ),
    ],
)
def test_what_cannot_be_used_is_told(
    tmp_path: Path, columns: dict[str, Any], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    _write(tmp_path / "train.parquet", **columns)
    _write(tmp_path / "test.parquet", **columns)
    with pytest.raises(error) as caught:
        Parquet(path=str(tmp_path), **settings).load()
    assert caught.value.what == message  # type: ignore[attr-defined]


def test_what_is_no_parquet_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file or folder"):
        Parquet(path=str(tmp_path / "nothing")).load()
    with pytest.raises(DataError, match="the folder holds no training part"):
        Parquet(path=str(tmp_path)).load()
    (tmp_path / "train.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="this is no Parquet file"):
        Parquet(path=str(tmp_path)).load()
    with pytest.raises(ConfigError, match='unknown setting "lable_column"'):
        from_json(SOURCES.get("parquet"), {"path": "x", "lable_column": "y"}, where="source")


@pytest.mark.parametrize(("name", "shape"), [("mnist", (1, 28, 28)), ("cifar10", (3, 32, 32))])
def test_real_images(shared_data: Path, name: str, shape: tuple[int, ...]) -> None:
    data = Parquet(path=str(shared_data / name)).load(limit=200, test_limit=50)
    assert data.test is not None
    assert (len(data.train), len(data.test)) == (200, 50)
    assert data.input_shape == shape
    assert data.num_classes == 10
    assert data.name == name
    assert 0 <= float(data.train.x.min()) < float(data.train.x.max()) <= 1


@pytest.mark.parametrize("name", ["banking77", "instruct"])
def test_real_texts_are_refused(shared_data: Path, name: str) -> None:
    with pytest.raises(DataError) as error:
        Parquet(path=str(shared_data / name)).load(limit=10)
    assert error.value.fix.startswith("this source reads images and numbers")
