"""Directions that seeds stand for."""

from __future__ import annotations

import math

import pytest
import torch

from fedfuse.core.seeding import Rng
from fedfuse.ops import zeroth_order
from fedfuse.ops.zeroth_order import seed_probabilities, shift, shift_by_sums


def test_a_direction_is_one_stream_of_normal_numbers_over_all_tensors() -> None:
    draw = Rng(3).torch("direction", 5)
    wanted = [torch.randn(6, generator=draw), torch.randn(4, generator=draw)]
    found = [torch.zeros(2, 3), torch.zeros(4, dtype=torch.float64)]
    shift(found, Rng(3), 5, 0.5)

    assert torch.equal(found[0], 0.5 * wanted[0].view(2, 3))
    assert torch.equal(found[1], 0.5 * wanted[1].double())


def test_large_tensors_are_drawn_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zeroth_order, "_BLOCK", 4)
    draw = Rng(0).torch("direction", 0)
    wanted = torch.cat([torch.randn(4, generator=draw), torch.randn(2, generator=draw)])
    found = torch.zeros(6)
    shift([found], Rng(0), 0, 1.0)

    assert torch.equal(found, wanted)


def test_directions_of_other_numbers_and_sources_are_others() -> None:
    found = {}
    for seed, number in ((0, 0), (0, 1), (1, 0)):
        tensor = torch.zeros(50_000)
        shift([tensor], Rng(seed), number, 1.0)
        found[seed, number] = tensor
    for pair in (((0, 0), (0, 1)), ((0, 0), (1, 0))):
        cosine = torch.cosine_similarity(found[pair[0]], found[pair[1]], dim=0).item()
        assert abs(cosine) < 5 / math.sqrt(50_000)
    assert found[0, 0].std().item() == pytest.approx(1.0, abs=0.02)


def test_steps_add_up_in_whatever_order_they_were_made() -> None:
    one, other = [torch.zeros(9, dtype=torch.float64)], [torch.zeros(9, dtype=torch.float64)]
    for number, slope in ((4, 0.25), (1, -2.0), (4, 0.5)):
        shift(one, Rng(0), number, -0.1 * slope)
    shift_by_sums(other, Rng(0), {4: 0.75, 1: -2.0, 7: 0.0}, -0.1)

    torch.testing.assert_close(one[0], other[0], rtol=0, atol=1e-15)


def test_seeds_with_larger_slopes_are_likelier() -> None:
    found = seed_probabilities(torch.tensor([1.0, 3.0, math.nan]))

    # What was never taken counts as the mean of the others: brought to [0, 1] they are 0, 1 and a half.
    total = 1 + math.e + math.exp(0.5)
    assert found.tolist() == pytest.approx([1 / total, math.e / total, math.exp(0.5) / total])
    assert seed_probabilities(torch.full((4,), math.nan)).tolist() == [0.25] * 4
    assert seed_probabilities(torch.full((4,), 2.0)).tolist() == [0.25] * 4
