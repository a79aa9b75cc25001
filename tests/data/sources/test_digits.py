from __future__ import annotations

import pytest
import torch

from fedfuse.core.registry import SOURCES
from fedfuse.data.sources.digits import Digits


def test_digits_are_split_once_and_for_all() -> None:
    data = Digits().load()
    assert data.test is not None
    assert (len(data.train), len(data.test)) == (1438, 359)
    assert data.input_shape == (1, 8, 8)
    assert data.num_classes == 10
    assert data.is_image
    assert float(data.train.x.max()) == 1.0
    assert data.train.x.dtype == torch.float32
    shares = data.test.y.bincount() / (data.test.y.bincount() + data.train.y.bincount())
    assert shares.tolist() == pytest.approx([0.2] * 10, abs=0.005)
    small = Digits().load(limit=5, test_limit=3)
    assert torch.equal(small.train.x, data.train.x[:5])
    assert torch.equal(small.test.y, data.test.y[:3])


def test_all_sources_are_registered_and_described() -> None:
    assert {"csv", "digits", "huggingface", "image_folder", "npz", "parquet"} <= set(SOURCES.names())
    assert all(SOURCES.summary(name).endswith(".") or ":" in SOURCES.summary(name) for name in SOURCES.names())
