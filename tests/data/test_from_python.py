from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from fedfuse.core.errors import DataError
from fedfuse.core.examples import Examples
from fedfuse.data.from_python import from_python

X = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
Y = torch.tensor([1, 0, 1])


class MapStyle(Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from zip(X, Y, strict=True)


class Refusing(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        raise AssertionError("a data set in tensors needs no loop")


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(X, Y),
        Refusing(X, Y),
        (X, Y),
        (X.numpy(), Y.numpy().astype(np.float64)),
        (X, Y[:, None]),
        Examples(X, Y),
        Stream(),
        MapStyle(list(zip(X, Y, strict=True))),
        MapStyle([(x.numpy(), int(y)) for x, y in zip(X, Y, strict=True)]),
        MapStyle([{"features": x.tolist(), "target": y} for x, y in zip(X, Y, strict=True)]),
        [(x.tolist(), y.item()) for x, y in zip(X, Y, strict=True)],
        Subset(TensorDataset(X.flip(0), Y.flip(0)), [2, 1, 0]),
        Subset(MapStyle(list(zip(X, Y, strict=True))), [0, 1, 2]),
    ],
)
def test_all_kinds_give_the_same_examples(dataset: Any) -> None:
    examples = from_python(dataset)
    assert torch.equal(examples.x, X)
    assert torch.equal(examples.y, Y)
    assert examples.y.dtype == torch.int64


def test_pil_images_are_read() -> None:
    image_module = pytest.importorskip("PIL.Image")
    image = image_module.fromarray(np.full((4, 5, 3), 255, dtype=np.uint8))
    assert from_python([(image, 0)]).x.shape == (1, 3, 4, 5)
    assert from_python([{"img": image.convert("L"), "label": 2}]).x.unique().tolist() == [1.0]


def test_hugging_face_data_is_read() -> None:
    datasets = pytest.importorskip("datasets")
    image_module = pytest.importorskip("PIL.Image")
    table = datasets.Dataset.from_dict({"features": X.tolist(), "label": Y.tolist()})
    assert torch.equal(from_python(table).x, X)
    grey = image_module.fromarray(np.full((2, 2), 51, dtype=np.uint8))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images = datasets.Dataset.from_dict({"image": [grey, grey], "label": [1, 0]}, features=features)
    examples = from_python(images)
    assert examples.x.shape == (2, 1, 2, 2)
    assert examples.y.tolist() == [1, 0]
    with pytest.raises(DataError, match="the inputs are texts"):
        from_python(datasets.Dataset.from_dict({"text": ["hello"], "label": [0]}))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "the data set is empty"),
        (TensorDataset(X[:0], Y[:0]), "the data set is empty"),
        ([([1.0], 0), ([1.0, 2.0], 0)], "input 0 has shape (1,) and input 1 has (2,)"),
        ([([1.0], 0.5)], "the label of example 0 is not a whole number: 0.5"),
        ([([1.0], "cat")], "the label of example 0 is not a whole number: 'cat'"),
        ((X, torch.tensor([0.0, 1.5, 1.0])), "the label of example 1 is not a whole number: 1.5"),
        ((X, torch.tensor([0.0, float("inf"), 1.0])), "the label of example 1 is not a whole number: inf"),
        ((X, np.array(["a", "b", "c"])), "the labels are not numbers"),
        ((X, torch.eye(3)), "the labels have shape (3, 3)"),
        ((X, Y - 1), "there is a label -1"),
        ((X, Y[:2]), "3 inputs came with 2 labels"),
        ([("hello", 0)], "the inputs are texts"),
        ([{"input_ids": [1, 2], "label": 0}], "the inputs are texts"),
        ([{"features": [1.0], "colour": 0}], "example 0 has no label: its keys are colour, features"),
        ([{"shape": [1.0], "label": 0}], "example 0 has no input: its keys are label, shape"),
        ([5], "example 0 is a int, not a pair"),
        ([(object(), 0)], "the input of example 0 is a object"),
        (7, "this is no data set"),
    ],
)
def test_what_is_no_data_is_refused(dataset: Any, message: str) -> None:
    with pytest.raises(DataError) as error:
        from_python(dataset)
    assert error.value.what == message
