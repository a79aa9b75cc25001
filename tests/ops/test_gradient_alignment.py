"""Two vectors by hand, and what must hold for any."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedfuse.ops.gradient_alignment import aligned, mean_update, num_conflicts

VECTORS = st.lists(st.integers(-5, 5), min_size=3, max_size=3).map(lambda values: torch.tensor(values).double())


def test_two_opposed_updates_by_hand() -> None:
    # a.b = -6; a - (-6/4) b = (3, 0) + 1.5 (-2, 0) = (0, 0) in the first place; b - (-6/10) a.
    a, b = torch.tensor([3.0, 1.0]), torch.tensor([-2.0, 0.0])
    found = aligned({"large": a, "small": b})
    assert found["large"].tolist() == [0.0, 1.0]
    assert found["small"].tolist() == pytest.approx([-0.2, 0.6])
    # Weights 3 and 1: 0.75 (0, 1) + 0.25 (-0.2, 0.6).
    assert mean_update({"large": a, "small": b}, {"large": 3, "small": 1}).tolist() == pytest.approx([-0.05, 0.9])


def test_exactly_opposite_updates_cancel() -> None:
    found = aligned({"a": torch.tensor([2.0, -4.0]), "b": torch.tensor([-1.0, 2.0])})
    assert found["a"].tolist() == [0.0, 0.0]
    assert found["b"].tolist() == [0.0, 0.0]


def test_an_update_that_is_zero_opposes_nobody() -> None:
    found = aligned({"a": torch.zeros(2), "b": torch.tensor([-1.0, 2.0])})
    assert found["b"].tolist() == [-1.0, 2.0]


def test_three_updates_go_in_the_order_of_their_names() -> None:
    a, b, c = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0]), torch.tensor([-1.0, -1.0])
    # a off b: (1, 0) + 0.5 (-1, 1) = (0.5, 0.5); then off c: (0.5, 0.5).(-1, -1) = -1: + 0.5 (-1, -1) = (0, 0).
    assert aligned({"c": c, "b": b, "a": a})["a"].tolist() == [0.0, 0.0]
    assert list(aligned({"c": c, "b": b, "a": a})) == ["a", "b", "c"]
    assert num_conflicts({"a": a, "b": b, "c": c}) == 2


@given(a=VECTORS, b=VECTORS)
def test_of_two_neither_opposes_the_other_afterwards(a: Tensor, b: Tensor) -> None:
    found = aligned({"a": a, "b": b})
    assert float(found["a"] @ found["b"]) >= -1e-9
    if float(a @ b) >= 0:
        assert torch.equal(found["a"], a)
        assert torch.equal(found["b"], b)
    else:
        assert float(found["a"] @ b) == pytest.approx(0, abs=1e-9)
        assert float(found["a"].norm()) <= float(a.norm()) + 1e-9


@given(vectors=st.lists(VECTORS, min_size=1, max_size=4))
def test_without_alignment_it_is_the_weighted_mean(vectors: list[Tensor]) -> None:
    weights = {str(i): float(i + 1) for i in range(len(vectors))}
    found = mean_update({str(i): v for i, v in enumerate(vectors)}, weights, aligns=False)
    wanted = sum((i + 1) * v for i, v in enumerate(vectors)) / sum(weights.values())
    assert torch.allclose(found, torch.as_tensor(wanted))
