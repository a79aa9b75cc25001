"""The learning rate of every step, known before the first."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse.training import LocalSGD, step_rates
from fedfuse.training.sgd import batches


@settings(max_examples=100, deadline=None)
@given(num_examples=st.integers(1, 70), batch_size=st.integers(1, 20), num_epochs=st.integers(1, 3))
def test_there_are_as_many_rates_as_batches(num_examples: int, batch_size: int, num_epochs: int) -> None:
    one_epoch = list(batches(num_examples, batch_size, torch.Generator().manual_seed(0)))
    rates = step_rates(LocalSGD(batch_size=batch_size, learning_rate=0.3), num_examples, num_epochs)
    assert rates == [0.3] * (len(one_epoch) * num_epochs)


def test_a_cosine_falls_from_the_rate_towards_zero() -> None:
    rates = step_rates(LocalSGD(batch_size=2, learning_rate=2.0, schedule="cosine"), 4, 2)
    assert rates == pytest.approx([2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5])
