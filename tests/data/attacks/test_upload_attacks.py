"""Forged tensors, redone by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedfuse.core.errors import ConfigError
from fedfuse.data.attacks.free_rider import FreeRider
from fedfuse.data.attacks.noise import Noise
from fedfuse.data.attacks.scaled import Scaled
from fedfuse.data.attacks.sign_flip import SignFlip

START = torch.tensor([1.0, -2.0]).double()
LEARNED = torch.tensor([1.5, -1.0]).double()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_difference_is_turned_round_or_multiplied() -> None:
    assert SignFlip(factor=1.0).forge(LEARNED, START, generator()).tolist() == [0.5, -3.0]
    assert SignFlip(factor=4.0).forge(LEARNED, START, generator()).tolist() == [-1.0, -6.0]
    assert Scaled(factor=10.0).forge(LEARNED, START, generator()).tolist() == [6.0, 8.0]
    assert Scaled(factor=1.0).forge(LEARNED, START, generator()).equal(LEARNED)


def test_two_of_ten_that_flip_four_times_as_far_cancel_the_mean() -> None:
    flipped = SignFlip().forge(LEARNED, START, generator())
    assert ((8 * LEARNED + 2 * flipped) / 10).tolist() == pytest.approx(START.tolist())


def test_one_of_ten_that_scales_by_ten_replaces_the_mean_of_others_that_agree() -> None:
    own = torch.tensor([7.0, 7.0]).double()
    assert ((9 * START + Scaled().forge(own, START, generator())) / 10).tolist() == pytest.approx([7.0, 7.0])


def test_noise_has_the_size_of_what_is_not_sent() -> None:
    start = torch.zeros(200_000).double()
    learned = torch.full_like(start, 0.3)
    forged = Noise(factor=2.0).forge(learned, start, generator())
    assert float(forged.std()) == pytest.approx(0.6, rel=0.01)
    assert float(forged.mean()) == pytest.approx(0, abs=0.01)
    assert forged.equal(Noise(factor=2.0).forge(learned, start, generator()))
    assert not forged.equal(Noise(factor=2.0).forge(learned, start, generator(1)))


def test_a_free_rider_sends_what_it_was_sent() -> None:
    assert FreeRider(noise_std=0.0).forge(LEARNED, START, generator()).equal(START)
    hidden = FreeRider(noise_std=0.01).forge(torch.ones(100_000), torch.zeros(100_000), generator())
    assert float(hidden.std()) == pytest.approx(0.01, rel=0.02)
    assert FreeRider().forges_uploads
    assert FreeRider().forges_buffers
    assert not SignFlip().forges_buffers


@pytest.mark.parametrize(
    ("kind", "setting", "value", "fix"),
    [
        (SignFlip, "factor", 0.0, "give a number above 0"),
        (Scaled, "factor", -1.0, "give a number above 0"),
        (Noise, "factor", 0.0, "give a number above 0"),
        (FreeRider, "noise_std", -0.1, "give 0 or more"),
    ],
)
def test_settings_that_cannot_be(kind: Any, setting: str, value: float, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**{setting: value})
    assert str(caught.value) == f"{setting} is {value}\n  where: attack.{setting}\n  fix:   {fix}"
