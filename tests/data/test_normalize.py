from __future__ import annotations

from typing import Any

import pytest
import torch

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.examples import Examples
from fedfuse.data.dataset import Dataset
from fedfuse.data.normalize import KNOWN, Normalization, measured_normalization, resolve_normalization

TABLE = Dataset(Examples(torch.tensor([[0.0, 5.0], [2.0, 5.0]]), torch.tensor([0, 1])), None, ("a", "b"), name="mnist")
IMAGES = Dataset(Examples(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1])), None, ("a", "b"), is_image=True, name="MNIST")


def test_measured_by_hand() -> None:
    found = measured_normalization(TABLE.train.x)
    assert found == Normalization((1.0, 5.0), (1.0, 1.0))
    assert found.apply(TABLE.train.x).tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    images = torch.tensor([0.0, 1.0, 0.0, 1.0]).view(1, 1, 2, 2)
    assert measured_normalization(images) == Normalization((0.5,), (0.5,))


def test_auto_takes_known_constants_for_images_only() -> None:
    assert resolve_normalization("auto", IMAGES) == KNOWN["mnist"]
    assert resolve_normalization("auto", TABLE) == measured_normalization(TABLE.train.x)
    colour = Dataset(
        Examples(torch.rand(2, 3, 4, 4), torch.tensor([0, 1])), None, ("a", "b"), is_image=True, name="mnist"
    )
    assert len(resolve_normalization("auto", colour).mean) == 3


def test_other_settings() -> None:
    assert resolve_normalization("none", TABLE).apply(TABLE.train.x) is TABLE.train.x
    assert resolve_normalization("fashion-mnist", IMAGES) == KNOWN["fashion_mnist"]
    assert resolve_normalization({"mean": [0.5], "std": [0.5]}, IMAGES) == Normalization((0.5,), (0.5,))
    assert resolve_normalization(Normalization((0.0,), (2.0,)), IMAGES) == Normalization((0.0,), (2.0,))


def test_digits_constants_are_those_of_its_training_part() -> None:
    from fedfuse.data.sources.digits import Digits

    measured = measured_normalization(Digits().load().train.x)
    assert KNOWN["digits"].mean == pytest.approx(measured.mean, abs=1e-4)
    assert KNOWN["digits"].std == pytest.approx(measured.std, abs=1e-4)


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ("cifar1", ConfigError, 'there is no normalisation "cifar1"'),
        ("cifar10", DataError, "the normalisation has 3 numbers, and the inputs have 1 channels or features"),
        ({"mean": [0.5]}, ConfigError, "normalize has the keys mean"),
        ({"mean": [0.5], "std": [0.0]}, ConfigError, "a standard deviation is not above 0"),
        ({"mean": [0.5], "std": [1, 1]}, ConfigError, "mean has 1 numbers and std has 2"),
        ({"mean": [float("nan")], "std": [1]}, ConfigError, "a mean is not finite"),
    ],
)
def test_what_cannot_be_used_is_refused(setting: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        resolve_normalization(setting, IMAGES)
    assert caught.value.what == message  # type: ignore[attr-defined]
