"""The weighted mean, redone by hand."""

from __future__ import annotations

import torch

from fedfuse.core.payload import Payload
from fedfuse.rules import fuse_uploads
from fedfuse.rules.mean import Mean

UPLOADS = [Payload({"model/w": torch.tensor([0.0, 8.0])}), Payload({"model/w": torch.tensor([4.0, -8.0])})]


def test_equal_weights() -> None:
    assert fuse_uploads(UPLOADS, Mean())["w"].tolist() == [2.0, 0.0]


def test_given_weights_are_divided_by_their_sum() -> None:
    assert fuse_uploads(UPLOADS, Mean(), [3, 1])["w"].tolist() == [1.0, 4.0]
    assert fuse_uploads(UPLOADS, Mean(), [1, 0])["w"].tolist() == [0.0, 8.0]


def test_it_accumulates_in_double_precision() -> None:
    # In float32, 2^24 + 1 is 2^24: a sum in single precision would lose the ones.
    uploads = [Payload({"model/w": torch.tensor([value])}) for value in (2.0**24, 1.0, 1.0, -(2.0**24))]
    assert fuse_uploads(uploads, Mean())["w"].tolist() == [0.5]


def test_a_sum_beyond_half_precision_does_not_overflow() -> None:
    uploads = [Payload({"model/w": torch.tensor([60_000.0]).half()})] * 3
    assert fuse_uploads(uploads, Mean())["w"].tolist() == [60_000.0]


def test_bfloat16_is_rounded_once() -> None:
    # (1 + 1.0078125) / 2 lies between two neighbours of bfloat16 and goes to the even one.
    uploads = [Payload({"model/w": torch.tensor([value]).bfloat16()}) for value in (1.0, 1.0078125)]
    assert fuse_uploads(uploads, Mean())["w"].equal(torch.tensor([1.0]).bfloat16())
