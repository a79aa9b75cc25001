from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.data.federate import federate
from fedfuse.data.partitions.iid import Iid
from fedfuse.data.sources.captioned import Captioned

Png = Callable[..., bytes]
GREYS = [0, 51, 102, 153, 204, 255]


@pytest.fixture
def folder(tmp_path: Path, png: Png) -> Path:
    """Six training pictures of 2 x 2 pixels, three of each class, and two to test on."""
    place = tmp_path / "pets"
    place.mkdir()
    rows = [
        {"image": {"bytes": png(np.full((2, 2), grey, np.uint8)), "path": ""}, "label": name, "text": text, "who": who}
        for grey, name, text, who in zip(
            GREYS,
            ["cat", "dog", "cat", "dog", "cat", "dog"],
            ["A dark one", *["a cat or a dog"] * 5],
            "ababab",
            strict=True,
        )
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), place / "train-0.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows[:2]), place / "test-0.parquet")
    return place


def test_pixels_then_tokens(folder: Path) -> None:
    data = Captioned(path=str(folder), caption_column="text", max_length=5).load()
    assert data.class_names == ("cat", "dog")
    assert data.train.y.tolist() == [0, 1, 0, 1, 0, 1]
    assert data.input_shape == (4 + 5,)
    # 0 is -1, 51 of 255 is -0.6; <unknown> a cat dark dog one or.
    assert data.train.x[0].tolist() == pytest.approx([-1, -1, -1, -1, 1, 3, 5, -1, -1])
    assert data.train.x[1].tolist() == pytest.approx([-0.6, -0.6, -0.6, -0.6, 1, 2, 6, 1, 4], abs=1e-6)
    assert data.columns["who"].tolist() == list("ababab")
    assert data.test is not None
    assert torch.equal(data.test.x, data.train.x[:2])
    assert torch.equal(
        Captioned(path=str(folder), caption_column="text", max_length=5).load(limit=2).train.x, data.test.x
    )


def test_codes_are_not_normalised(folder: Path) -> None:
    data = Captioned(path=str(folder), caption_column="text", max_length=5).load()
    federated = federate(data, Iid(num_clients=2), seed=0)
    assert federated.normalization.mean == ()
    assert federated.augment == "none"
    assert federated.test is not None
    assert data.test is not None
    assert torch.equal(federated.test.x, data.test.x)


def test_captions_from_classes(folder: Path) -> None:
    source = Captioned(path=str(folder), templates=("the {class}",), max_length=3)
    # <unknown> cat dog the
    assert source.load().train.x[:2, 4:].tolist() == [[3, 1, -1], [3, 2, -1]]
    only = Captioned(path=str(folder), templates=("the {class}",), max_length=3, classes=("dog",)).load(limit=2)
    assert only.class_names == ("cat", "dog")
    assert only.train.y.tolist() == [1, 1]
    assert only.train.x[:, 4:].tolist() == [[3, 2, -1], [3, 2, -1]]
    assert only.columns["who"].tolist() == ["b", "b"]
    assert only.test is not None
    assert only.test.y.tolist() == [1]


def test_folders_of_files(tmp_path: Path, png: Png) -> None:
    root = tmp_path / "shots"
    for grey, name in enumerate(["train/cat/1.png", "train/cat/2.png", "train/dog/1.png", "test/dog/1.png"]):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(np.full((2, 2), grey * 51, np.uint8)))
    data = Captioned(path=str(root), templates=("{class}",), max_length=1).load()
    assert data.train.y.tolist() == [0, 1, 0]
    assert data.train.x[:, 4].tolist() == [1, 2, 1]
    assert data.test is not None
    assert data.test.x[:, 0].tolist() == pytest.approx([153 / 255 * 2 - 1])
    lines = [{"file_name": "cat/2.png", "caption": "old cat"}, {"file_name": "dog/1.png", "caption": "dog"}]
    (root / "train" / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (root / "test" / "metadata.csv").write_text('file_name,caption\ndog/1.png,"a ""dog"""\n')
    told = Captioned(path=str(root), caption_column="caption", max_length=2).load()
    assert told.class_names == ("all",)
    assert told.train.y.tolist() == [0, 0]
    assert told.train.x[:, 4:].tolist() == [[3, 1], [2, -1]]  # <unknown> cat dog old
    assert told.test is not None
    assert told.test.x[:, 4:].tolist() == [[0, 0]]


def test_mistakes_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        Captioned(path=str(folder), caption_column="txt").load()
    assert (error.value.what, error.value.fix) == (
        'caption_column: there is no column "txt"',
        'did you mean "text"? known: image, label, text, who',
    )
    with pytest.raises(ConfigError) as error:
        Captioned(path=str(folder), classes=("dogs",)).load()
    assert (error.value.what, error.value.where) == ('there is no class "dogs"', "source.classes")
    bare = tmp_path / "bare.parquet"
    table = parquet.read_table(folder / "train-0.parquet")
    parquet.write_table(table.select(["image", "who"]), bare)
    with pytest.raises(ConfigError) as error:
        Captioned(path=str(bare)).load()
    assert (error.value.what, error.value.fix) == (
        "there are neither captions nor classes to make some from",
        "set caption_column or label_column to one of: image, who",
    )
    parquet.write_table(table.select(["label", "text"]), bare)
    with pytest.raises(ConfigError, match="there is no column of images"):
        Captioned(path=str(bare), caption_column="text").load()
    gap = table.set_column(2, "text", pyarrow.array(["a", None, "b", "c", "d", "e"]))
    parquet.write_table(gap, bare)
    with pytest.raises(DataError) as gone:
        Captioned(path=str(bare), caption_column="text").load()
    assert gone.value.what == 'the column "text" has no text in row 1'
    shots = tmp_path / "shots"
    (shots / "train").mkdir(parents=True)
    (shots / "train" / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a"}')
    with pytest.raises(DataError) as gone:
        Captioned(path=str(shots), caption_column="text").load()
    assert (gone.value.what, gone.value.fix) == (
        'there is no file "1.png" in row 0',
        "name a file beside metadata.jsonl",
    )
