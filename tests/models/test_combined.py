"""Ensembles with a combiner: each combiner by hand, and the recipes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fedfuse.core.artifact import build, detached_state, load_state
from fedfuse.core.errors import ModelError
from fedfuse.models import spec
from fedfuse.models.combined import Aggregator, Combined, Polychotomous, Weighted, member_logits

LOGITS = torch.tensor([[[2.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
"""One input, two members, three classes."""


def test_a_weighted_sum_by_hand() -> None:
    assert Weighted(torch.tensor([0.5, 2.0]))(LOGITS).tolist() == [[1.0, 0.5, 2.0]]


def test_polychotomous_votes_by_hand() -> None:
    likelihoods = torch.tensor(
        [
            [[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]],
            [[0.1, 0.1, 0.8], [0.3, 0.4, 0.3], [0.1, 0.1, 0.8]],
        ]
    )
    # Member 0 says class 0, member 1 says class 2: column 0 of the one times column 2 of the other.
    wanted = [0.5 * 0.8, 0.1 * 0.3, 0.2 * 0.8]
    found = Polychotomous(likelihoods.log())(LOGITS)
    assert found[0].tolist() == pytest.approx([math.log(p) for p in wanted], rel=1e-5)


def test_an_aggregator_by_hand() -> None:
    net = Aggregator(2, 3, 1)
    assert [tuple(p.shape) for p in net.parameters()] == [(2, 6), (2,), (3, 2), (3,)]
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(1.0)
        net.hidden.weight[1] = -1.0
    # The logits add up to 4: hidden units 4 + 1 and max(-4 + 1, 0); out 5 + 0 + 1.
    assert net(LOGITS).tolist() == [[6.0, 6.0, 6.0]]


def test_no_aggregator_of_nothing() -> None:
    with pytest.raises(ModelError) as caught:
        Aggregator(2, 3, 0)
    assert str(caught.value) == ("an aggregator of 2 members, 3 classes and width 0\n  fix:   give at least 1 of each")


@pytest.mark.parametrize(
    "combiner", [Aggregator(2, 3, 4), Weighted(torch.tensor([0.3, 0.7])), Polychotomous(-torch.rand(2, 3, 3))]
)
def test_the_recipe_rebuilds_members_and_combiner(combiner: nn.Module) -> None:
    members = [spec("mlp", {"width": w}, input_shape=(5,), num_classes=3, seed=w) for w in (4, 6)]
    net = Combined([m.build() for m in members], combiner, recipes=[m.recipe for m in members]).eval()
    x: Tensor = torch.randn(4, 5)
    torch.testing.assert_close(net(x), combiner(member_logits(net.members, x)))
    rebuilt = build(net.recipe).eval()
    load_state(rebuilt, detached_state(net))
    assert torch.equal(rebuilt(x), net(x))
    assert net(x).shape == (4, 3)
