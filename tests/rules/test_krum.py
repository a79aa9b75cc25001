"""Krum and multi-Krum, redone by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfuse.core.errors import ConfigError, ModelError
from fedfuse.rules import fuse_uploads
from fedfuse.rules.krum import Krum
from fedfuse.rules.multi_krum import MultiKrum
from fedfuse.rules.rule import Rule


def fused(rule: Rule, *values: float, weights: list[float] | None = None) -> float:
    return fuse_uploads([{"model/w": torch.tensor([float(v)])} for v in values], rule, weights)["w"].item()


def test_the_score_is_the_sum_over_the_nearest() -> None:
    # n = 6, f = 1: three nearest others. At 2: 1 + 1 + 4; at 1: 1 + 1 + 4 as well, and the first of equals wins.
    assert fused(Krum(num_hostile=1), 0, 1, 2, 3, 50, 60) == 1
    # n = 7, f = 2: three nearest again.
    assert fused(Krum(num_hostile=2), 0, 1, 2, 3, 50, 60, 70) == 1
    assert fused(MultiKrum(num_hostile=1, num_chosen=2), 0, 1, 2, 3, 50, 60) == 1.5
    assert fused(MultiKrum(num_hostile=1), 0, 1, 2, 3, 50, 60) == pytest.approx((0 + 1 + 2 + 3 + 50) / 5)
    assert fused(MultiKrum(), 0, 1, 2, 3, 50, 60, 70) == pytest.approx((0 + 1 + 2 + 3 + 50) / 5)


def test_weights_buy_no_influence() -> None:
    for rule in (Krum(), MultiKrum(num_chosen=2)):
        assert fused(rule, 0, 1, 2, 3, 9, weights=[1, 1, 1, 1, 1e9]) == fused(rule, 0, 1, 2, 3, 9)


@pytest.mark.parametrize("rule", [Krum(), MultiKrum(), Krum(num_hostile=4)], ids=repr)
def test_one_client_gives_that_very_model(rule: Rule) -> None:
    assert fused(rule, 3.25) == 3.25


def test_two_clients_are_at_one_distance_and_the_first_wins() -> None:
    assert (fused(Krum(), 1, 5), fused(MultiKrum(), 1, 5)) == (1, 3)


def test_a_model_is_chosen_whole() -> None:
    models = [
        {
            "model/w": torch.tensor([float(w)]),
            "model/running_var": torch.tensor([float(k)]),
            "model/steps": torch.tensor(10 * k),
            "model/mask": torch.tensor([k == 2]),
        }
        for k, w in enumerate([100, 0, 0.1, 0.2, -70])
    ]
    found = fuse_uploads(models, Krum(), buffers=("running_var",))
    assert {name: value.tolist() for name, value in found.items()} == {
        "w": [pytest.approx(0.1)],
        "running_var": [2.0],
        "steps": 20,
        "mask": [True],
    }


def test_a_client_with_no_weight_is_not_even_read() -> None:
    assert fused(Krum(), 1, 1.5, 2, float("nan"), 1.25) == 1.25


@given(st.integers(0, 10_000), st.integers(1, 3))
def test_whatever_f_clients_send_an_honest_spread_bounds_the_result(seed: int, num_hostile: int) -> None:
    g = torch.Generator().manual_seed(seed)
    num_clients = 2 * num_hostile + 3
    rows = torch.rand(num_clients, 6, generator=g)
    rows[:num_hostile] += 1e6 * torch.randn(num_hostile, 6, generator=g).sign()
    uploads = [{"model/w": row} for row in rows]
    chosen = fuse_uploads(uploads, Krum(num_hostile=num_hostile))["w"]
    assert any(chosen.equal(row) for row in rows[num_hostile:])
    mean = fuse_uploads(uploads, MultiKrum(num_hostile=num_hostile))["w"]
    assert float((mean - 0.5).abs().max()) <= 0.5


def test_too_few_clients_for_the_guarantee() -> None:
    with pytest.raises(ModelError) as caught:
        fused(Krum(num_hostile=2), 1, 2, 3, 4, 5, 6)
    assert str(caught.value) == (
        "6 clients cannot outvote 2 hostile ones under this rule\n  where: rule.num_hostile\n"
        "  fix:   ask at least 7 clients, or set num_hostile to 1 or less"
    )


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError) as caught:
        Krum(num_hostile=-1)
    assert str(caught.value) == "num_hostile is -1\n  where: rule.num_hostile\n  fix:   give 0 or more"
    with pytest.raises(ConfigError) as caught:
        MultiKrum(num_chosen=0)
    assert str(caught.value) == "num_chosen is 0\n  where: rule.num_chosen\n  fix:   give at least 1"
    with pytest.raises(ConfigError):
        MultiKrum(num_hostile=-1)
