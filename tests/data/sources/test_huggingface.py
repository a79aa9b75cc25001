from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.data.sources.huggingface import HuggingFace

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    image_module = pytest.importorskip("PIL.Image")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})

    def part(rows: int) -> object:
        pictures = [image_module.fromarray(np.full((2, 2, 3), row, dtype=np.uint8)) for row in range(rows)]
        return datasets.Dataset.from_dict(
            {"img": pictures, "label": [row % 2 for row in range(rows)]}, features=features
        )

    datasets.DatasetDict({"train": part(5), "test": part(2)}).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_a_saved_data_set(saved: Path) -> None:
    data = HuggingFace(name=str(saved)).load()
    assert data.input_shape == (3, 2, 2)
    assert data.class_names == ("a", "b")
    assert data.name == "saved"
    assert (data.train.x[:, 0, 0, 0] * 255).round().tolist() == [0, 1, 2, 3, 4]
    assert len(data.test or ()) == 2
    small = HuggingFace(name=str(saved)).load(limit=2, test_limit=1)
    assert torch.equal(small.train.x, data.train.x[:2])
    assert torch.equal(small.train.y, data.train.y[:2])


def test_splits_are_checked(saved: Path) -> None:
    with pytest.raises(ConfigError) as error:
        HuggingFace(name=str(saved), train_split="trian").load()
    assert (error.value.what, error.value.fix) == (
        'train_split: there is no split "trian"',
        'did you mean "train"? known: test, train',
    )
    with pytest.raises(ConfigError, match='test_split: there is no split "validation"'):
        HuggingFace(name=str(saved), test_split="validation").load()
    with pytest.warns(UserWarning, match="has no test part"):
        assert HuggingFace(name=str(saved), test_split="").load().test is None


def test_a_folder_of_files(tmp_path: Path) -> None:
    (tmp_path / "table").mkdir()
    rows = datasets.Dataset.from_dict({"a": list(range(10)), "label": [row % 2 for row in range(10)]})
    rows.to_parquet(tmp_path / "table" / "train-00000-of-00001.parquet")
    data = HuggingFace(name=str(tmp_path / "table"), test_fraction=0.2).load()
    assert data.test is not None
    assert (len(data.train), len(data.test), data.input_shape) == (8, 2, (1,))


def test_what_cannot_be_reached_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        HuggingFace(name="nobody/nothing-at-all").load()
    assert error.value.what.startswith("the data set cannot be loaded: ")
    assert error.value.where == "nobody/nothing-at-all"
    assert error.value.fix == "check the id, the subset and the network; without a network name a local folder"
