"""Data sets of a user's own program to examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from fedfuse.core.errors import DataError
from fedfuse.core.examples import Examples
from fedfuse.data.images import pixels
from fedfuse.data.tables import LABEL_NAMES
from fedfuse.data.tensors import as_inputs

_INPUT_NAMES = ("image", "img", "pixel_values", "x", "input", "inputs", "features", "data")
_TEXT_NAMES = ("text", "input_ids", "prompt", "sentence")


def from_python(dataset: Any, number: Callable[[Any], int] | None = None) -> Examples:
    """Turn a data set of the user's own into examples.

    Images become float32 with the channels first; pixels of whole numbers are divided by 255, floating point numbers
    are taken as they are. Labels are whole numbers from 0 on and are not renumbered, so that clients which lack a
    class agree on the others.

    Args:
        dataset: a torch ``Dataset`` (map-style or iterable) or any sequence of pairs ``(input, label)`` or of
            dictionaries with an ``image`` (or ``x``, ``features``, ...) and a ``label`` (or ``target``, ``y``, ...); a
            ``TensorDataset``; a Hugging Face ``Dataset``; a pair of tensors or arrays ``(x, y)``; or examples.
        number: turns a label, a whole number or a text, into the number of its class; left out, labels are numbers.

    Returns:
        The examples, in the data set's order.

    Raises:
        DataError: the data set is empty, its inputs differ in shape or are texts, or its labels are not classes.

    Example:
        >>> examples = from_python([([0.0, 1.0], 0), ([1.0, 0.0], 1)])
        >>> tuple(examples.x.shape), examples.y.tolist()
        ((2, 2), [0, 1])
    """
    where = f"data set of type {type(dataset).__name__}"
    if isinstance(dataset, Examples):
        # Already in our form: channels come first by contract, so nothing is guessed.
        return Examples(dataset.x.to(torch.float32), _labels(_numbered(dataset.y, number), where))
    whole = _whole_tensors(dataset)
    if whole is not None:
        return _examples(whole[0], _numbered(whole[1], number), where)
    inputs: list[np.ndarray] = []
    labels: list[Any] = []
    for row, item in enumerate(_items(dataset, where)):
        x, y = _pair(item, row, where)
        inputs.append(_input_array(x, row, where))
        labels.append(
            np.asarray(y).item() if isinstance(y, (Tensor, np.ndarray)) and np.size(np.asarray(y)) == 1 else y
        )
    if not inputs:
        raise DataError("the data set is empty", where=where, fix="give it at least one example")
    for row, array in enumerate(inputs):
        if array.shape != inputs[0].shape:
            raise DataError(
                f"input 0 has shape {inputs[0].shape} and input {row} has {array.shape}",
                where=where,
                fix="bring all inputs to one shape",
            )
    return _examples(np.stack(inputs), _label_array(labels if number is None else map(number, labels), where), where)


def _numbered(y: Tensor | np.ndarray, number: Callable[[Any], int] | None) -> Tensor | np.ndarray:
    """Labels as numbers of the common classes; each label that occurs is looked up once."""
    if number is None or len(y) == 0:
        return y
    values = y.detach().cpu().numpy() if isinstance(y, Tensor) else y
    names, places = np.unique(values, return_inverse=True)
    numbers = np.array([number(name) for name in names.tolist()], dtype=np.int64)
    return numbers[places].reshape(values.shape)


def _whole_tensors(dataset: Any) -> tuple[Any, Any] | None:
    """Inputs and labels of data that already lies in tensors, so that no loop over examples is needed."""
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        return dataset.tensors[0], dataset.tensors[1]
    if isinstance(dataset, Subset) and isinstance(dataset.dataset, TensorDataset) and len(dataset.dataset.tensors) == 2:
        index = torch.as_tensor(list(dataset.indices), dtype=torch.int64)
        x, y = dataset.dataset.tensors
        return x[index], y[index]
    if (
        isinstance(dataset, tuple)
        and len(dataset) == 2
        and all(isinstance(part, (Tensor, np.ndarray)) for part in dataset)
    ):
        return dataset[0], dataset[1]
    return None


def _items(dataset: Any, where: str) -> Iterator[Any]:
    # Numbers as arrays, images as they are: Hugging Face lists of numbers would else be slow Python lists.
    if type(dataset).__module__.partition(".")[0] == "datasets" and hasattr(dataset, "with_format"):
        dataset = dataset.with_format("numpy") if not _has_images(dataset) else dataset
        yield from dataset
    elif hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, Mapping):
        for index in range(len(dataset)):
            yield dataset[index]
    elif isinstance(dataset, Iterable) and not isinstance(dataset, (str, bytes, Mapping)):
        yield from dataset
    else:
        raise DataError(
            "this is no data set",
            where=where,
            fix="give a torch Dataset, a Hugging Face Dataset, or a pair (x, y) of tensors",
        )


def _has_images(dataset: Any) -> bool:
    return any(type(feature).__name__ == "Image" for feature in (dataset.features or {}).values())


def _pair(item: Any, row: int, where: str) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        x_name = next((name for name in _INPUT_NAMES if name in item), None)
        y_name = next((name for name in LABEL_NAMES if name in item), None)
        if x_name is None and any(name in item for name in _TEXT_NAMES):
            raise DataError("the inputs are texts", where=where, fix="this source reads images and numbers")
        if x_name is None or y_name is None:
            lacking, known = ("input", _INPUT_NAMES) if x_name is None else ("label", LABEL_NAMES)
            raise DataError(
                f"example {row} has no {lacking}: its keys are {', '.join(sorted(map(str, item)))}",
                where=where,
                fix=f"call it one of: {', '.join(known)}",
            )
        return item[x_name], item[y_name]
    if isinstance(item, Sequence) and not isinstance(item, (str, bytes)) and len(item) == 2:
        return item[0], item[1]
    raise DataError(
        f"example {row} is a {type(item).__name__}, not a pair",
        where=where,
        fix="give pairs (input, label), or dictionaries with image and label",
    )


def _input_array(x: Any, row: int, where: str) -> np.ndarray:
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        return np.asarray(x.float() if x.dtype == torch.bfloat16 else x)
    if hasattr(x, "mode") and hasattr(x, "convert"):
        return pixels(x)
    if isinstance(x, str) or (isinstance(x, (list, tuple)) and any(isinstance(value, str) for value in x)):
        raise DataError("the inputs are texts", where=where, fix="this source reads images and numbers")
    try:
        array = np.asarray(x)
    except ValueError:
        raise DataError(
            f"the input of example {row} is not a regular array",
            where=where,
            fix="give tensors, arrays, images or lists of numbers",
        ) from None
    if array.dtype.kind not in "iufb":
        raise DataError(
            f"the input of example {row} is a {type(x).__name__}",
            where=where,
            fix="give tensors, arrays, images or lists of numbers",
        )
    return array


def _label_array(labels: Iterable[Any], where: str) -> np.ndarray:
    labels = list(labels)
    for row, label in enumerate(labels):
        is_whole = isinstance(label, (bool, int, np.integer, np.bool_)) or (
            isinstance(label, (float, np.floating)) and float(label).is_integer()
        )
        if not is_whole:
            raise DataError(
                f"the label of example {row} is not a whole number: {label!r:.40}",
                where=where,
                fix="number the classes 0 .. num_classes - 1",
            )
    return np.array([int(label) for label in labels], dtype=np.int64)


def _examples(x: Tensor | np.ndarray, y: Tensor | np.ndarray, where: str) -> Examples:
    labels = _labels(y, where)
    inputs, _ = as_inputs(x, where=where)
    return Examples(inputs, labels)


def _labels(y: Tensor | np.ndarray, where: str) -> Tensor:
    if len(y) == 0:
        raise DataError("the data set is empty", where=where, fix="give it at least one example")
    if isinstance(y, np.ndarray) and y.dtype.kind not in "iufb":
        raise DataError("the labels are not numbers", where=where, fix="number the classes 0 .. num_classes - 1")
    labels = torch.as_tensor(y).detach().cpu()
    if labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dim() != 1:
        raise DataError(
            f"the labels have shape {tuple(labels.shape)}",
            where=where,
            fix="give one class per example: shape (num_examples,)",
        )
    if labels.dtype.is_floating_point:
        wrong = (~torch.isfinite(labels) | (labels != labels.floor())).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"the label of example {row} is not a whole number: {labels[row].item()}",
                where=where,
                fix="number the classes 0 .. num_classes - 1",
            )
    labels = labels.to(torch.int64)
    if int(labels.min()) < 0:
        raise DataError(
            f"there is a label {int(labels.min())}", where=where, fix="number the classes 0 .. num_classes - 1"
        )
    return labels
