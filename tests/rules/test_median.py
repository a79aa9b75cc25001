"""The median, redone by hand."""

from __future__ import annotations

import pytest
import torch

from fedfuse.rules import fuse_uploads
from fedfuse.rules.median import Median


@pytest.mark.parametrize(
    ("values", "wanted"),
    [([3.0], 3.0), ([1.0, 2.0], 1.5), ([5.0, 1.0, 2.0], 2.0), ([1.0, 9.0, 2.0, 4.0], 3.0), ([1.0, 1.0, 7.0], 1.0)],
)
def test_the_middle(values: list[float], wanted: float) -> None:
    uploads = [{"model/w": torch.tensor([value])} for value in values]
    assert fuse_uploads(uploads, Median())["w"].tolist() == [wanted]


def test_every_coordinate_has_its_own_middle() -> None:
    stack = torch.tensor([[1.0, 9.0], [2.0, 8.0], [3.0, 7.0]])
    assert Median().fuse(stack.double(), torch.ones(3)).tolist() == [2.0, 8.0]


def test_one_wild_client_moves_nothing_far() -> None:
    honest = [torch.tensor([1.0, -1.0]), torch.tensor([1.1, -0.9]), torch.tensor([0.9, -1.1])]
    for wild in (1e30, -1e30):
        uploads = [{"model/w": w} for w in [*honest, torch.tensor([wild, wild])]]
        fused = fuse_uploads(uploads, Median())["w"]
        assert float((fused - torch.tensor([1.0, -1.0])).abs().max()) <= 0.1 + 1e-6


def test_weights_buy_no_influence() -> None:
    uploads = [{"model/w": torch.tensor([value])} for value in (1.0, 2.0, 9.0)]
    assert fuse_uploads(uploads, Median(), [1, 1, 1000])["w"].tolist() == [2.0]
