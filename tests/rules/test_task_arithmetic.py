"""Task arithmetic, redone by hand."""

from __future__ import annotations

import pytest
import torch

from fedfuse.core.errors import ConfigError, ModelError
from fedfuse.rules import fuse_uploads
from fedfuse.rules.mean import Mean
from fedfuse.rules.task_arithmetic import TaskArithmetic

BASE = {"w": torch.tensor([10.0, 20.0])}
UPLOADS = [{"model/w": torch.tensor([11.0, 18.0])}, {"model/w": torch.tensor([13.0, 20.0])}]


@pytest.mark.parametrize(
    ("scaling", "wanted"), [(0.0, [10.0, 20.0]), (1.0, [14.0, 18.0]), (0.5, [12.0, 19.0]), (None, [12.0, 19.0])]
)
def test_the_base_plus_the_scaled_sum_of_the_changes(scaling: float | None, wanted: list[float]) -> None:
    assert fuse_uploads(UPLOADS, TaskArithmetic(scaling=scaling), base=BASE)["w"].tolist() == wanted


def test_by_default_it_is_the_mean_for_any_base_and_any_weights() -> None:
    mean = fuse_uploads(UPLOADS, Mean(), [3, 1])["w"]
    for base in (BASE["w"], torch.zeros(2)):
        assert fuse_uploads(UPLOADS, TaskArithmetic(), [3, 1], base={"w": base})["w"].equal(mean)


def test_a_scaling_below_zero_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        TaskArithmetic(scaling=-1.0)
    assert str(caught.value) == "scaling is -1.0\n  where: rule.scaling\n  fix:   give 0 or more"


def test_without_a_base_it_is_refused() -> None:
    with pytest.raises(ModelError) as caught:
        fuse_uploads(UPLOADS, TaskArithmetic())
    assert str(caught.value) == (
        "TaskArithmetic fuses differences from the weights that all clients began with, and there are none\n"
        "  fix:   give these weights as base, or use another rule"
    )


def test_a_base_of_another_architecture_is_refused() -> None:
    same = "\n  fix:   fuse uploads of the same architecture"
    for base, has in ({"w": torch.zeros(3)}, "(3,) torch.float32"), ({}, "nothing"), ({"w": 1}, "nothing"):
        with pytest.raises(ModelError) as caught:
            fuse_uploads(UPLOADS, TaskArithmetic(), base=base)
        assert str(caught.value) == f'the base has {has} as "w", upload 0 has (2,) torch.float32' + same
