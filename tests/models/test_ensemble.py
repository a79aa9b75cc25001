"""Ensembles: every combination by hand, and the recipe."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fedfuse.core.artifact import build, detached_state, load_state
from fedfuse.core.errors import ModelError
from fedfuse.models import spec
from fedfuse.models.ensemble import Ensemble


class Says(nn.Module):
    """Always the same probabilities."""

    def __init__(self, *probabilities: float) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor(probabilities).log())

    def forward(self, x: Tensor) -> Tensor:
        logits = self.logits
        assert isinstance(logits, Tensor)
        return logits.expand(len(x), -1)


def _answer(combine: str, *members: nn.Module, weights: list[list[float]] | None = None) -> list[float]:
    net = Ensemble(members, combine=combine, num_classes=2)
    if weights is not None:
        net.weights.copy_(torch.tensor(weights))
    answer: list[float] = net(torch.zeros(1, 1))[0].tolist()
    return answer


def test_mean_of_logits_by_hand() -> None:
    # Logits log 0.5, log 0.5 and log 0.2, log 0.8.
    expected = [(math.log(0.5) + math.log(0.2)) / 2, (math.log(0.5) + math.log(0.8)) / 2]
    assert _answer("mean_logits", Says(0.5, 0.5), Says(0.2, 0.8)) == pytest.approx(expected)


def test_mean_of_probabilities_by_hand() -> None:
    expected = [math.log(0.35), math.log(0.65)]
    assert _answer("mean_probabilities", Says(0.5, 0.5), Says(0.2, 0.8)) == pytest.approx(expected)


def test_votes_by_hand() -> None:
    members = [Says(0.6, 0.4), Says(0.6, 0.4), Says(0.01, 0.99)]
    assert _answer("vote", *members) == pytest.approx([math.log(2 / 3), math.log(1 / 3)])


def test_label_counts_weigh_each_class_apart() -> None:
    # The first model knows class 0 only, the second class 1 only.
    members = [Says(0.9, 0.1), Says(0.3, 0.7)]
    answer = _answer("label_count", *members, weights=[[1.0, 0.0], [0.0, 1.0]])
    assert answer == pytest.approx([math.log(0.9), math.log(0.7)])


@pytest.mark.parametrize("combine", ["mean_logits", "mean_probabilities", "vote", "label_count"])
def test_one_member_decides_alone(combine: str) -> None:
    answer = _answer(combine, Says(0.2, 0.8))
    assert answer[1] > answer[0]
    assert all(map(math.isfinite, answer))


def test_an_unknown_combination_is_refused() -> None:
    with pytest.raises(ModelError) as caught:
        Ensemble([Says(0.5, 0.5)], combine="median", num_classes=2)
    assert caught.value.what == 'there is no ensemble "median"'
    assert caught.value.fix == "use one of mean_logits, mean_probabilities, vote, label_count"


def test_the_recipe_rebuilds_the_ensemble() -> None:
    specs = [spec("mlp", {"width": w}, input_shape=(4,), num_classes=3, seed=w) for w in (4, 6)]
    net = Ensemble(
        [one.build() for one in specs],
        combine="label_count",
        num_classes=3,
        recipes=[one.recipe for one in specs],
    ).eval()
    net.weights.copy_(torch.tensor([[0.9, 0.1, 0.5], [0.1, 0.9, 0.5]]))
    again = build(net.recipe).eval()
    load_state(again, detached_state(net))
    x = specs[0].example_input(5)
    assert torch.equal(again(x), net(x))
