from __future__ import annotations

import numpy as np
import pytest
import torch

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.examples import Examples
from fedfuse.data.dataset import Dataset


def _examples(n: int, features: int = 2) -> Examples:
    return Examples(torch.arange(n * features, dtype=torch.float32).view(n, features), torch.arange(n) % 2)


def test_limited_takes_the_first_rows() -> None:
    data = Dataset(_examples(6), _examples(4), ("a", "b"), {"site": np.array(list("uvwxyz"))})
    small = data.limited(2, 3)
    assert small.train.y.tolist() == [0, 1]
    assert len(small.test or ()) == 3
    assert small.columns["site"].tolist() == ["u", "v"]
    assert small.class_names == ("a", "b")
    assert len(data.limited(100).train) == 6
    with pytest.raises(ConfigError, match="limit must be at least 1, not 0"):
        data.limited(0)


def test_a_test_part_is_split_off_once_and_always_alike() -> None:
    data = Dataset(_examples(20), None, ("a", "b"), {"row": np.arange(20)})
    split = data.with_test_part(0.2)
    assert split.test is not None
    assert split.test.y.bincount().tolist() == [2, 2]
    assert len(split.columns["row"]) == 16
    assert torch.equal(split.train.x[:, 0], torch.from_numpy(split.columns["row"]).float() * 2)
    assert torch.equal(split.train.x, data.with_test_part(0.2).train.x)
    assert split.with_test_part(0.5) is split


def test_no_test_part_is_said() -> None:
    with pytest.warns(
        UserWarning, match="wine has no test part, so no test accuracy can be reported; set test_fraction"
    ):
        Dataset(_examples(4), None, ("a", "b"), name="wine").with_test_part(0.0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Dataset(_examples(0), None, ("a",)), "the training part is empty"),
        (lambda: Dataset(_examples(2), None, ("a",)), "the training labels go from 0 to 1, but there are 1 classes"),
        (
            lambda: Dataset(_examples(2), _examples(2, features=3), ("a", "b")),
            "training inputs have shape (2,) and test inputs (3,)",
        ),
        (
            lambda: Dataset(_examples(2), None, ("a", "b"), {"site": np.arange(3)}),
            'the column "site" has 3 values for 2 training examples',
        ),
        (
            lambda: Dataset(Examples(torch.zeros(2), torch.zeros(2, dtype=torch.int64)), None, ("a",)),
            "the training inputs have shape (2,)",
        ),
    ],
)
def test_parts_must_fit(build: object, message: str) -> None:
    with pytest.raises(DataError) as error:
        build()  # type: ignore[operator]
    assert error.value.what == message
