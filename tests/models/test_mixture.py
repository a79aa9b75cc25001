"""Experts under a gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fedfuse.core.artifact import build
from fedfuse.core.errors import ModelError
from fedfuse.models import spec
from fedfuse.models.ensemble import Ensemble
from fedfuse.models.mixture import Gate, Mixture, mixed_logits

FACTS: dict[str, Any] = {"input_shape": (1, 8, 8), "num_classes": 3}


def gate(weight: list[list[float]], bias: list[float], top_k: int) -> Gate:
    made = Gate(len(weight[0]), len(weight), top_k)
    made.linear.weight.data, made.linear.bias.data = torch.tensor(weight), torch.tensor(bias)
    return made


def test_the_answer_by_hand() -> None:
    # Weights for x = 2: (2, 6, -1). All count: (2 (1, 0) + 6 (0, 1) - (1, 1)) / 3; the best two: (2, 6) / 2.
    logits = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 1.0]]])
    x = torch.tensor([[2.0]])
    for top_k, wanted in ((3, [[1 / 3, 5 / 3]]), (2, [[1.0, 3.0]]), (1, [[0.0, 6.0]])):
        weights = gate([[1.0], [2.0], [0.0]], [0.0, 2.0, -1.0], top_k)(x)
        torch.testing.assert_close(mixed_logits(weights, logits, top_k), torch.tensor(wanted))


def test_at_first_it_is_the_uniform_ensemble() -> None:
    specs = [spec("cnn", {"width": 4, "depth": 2}, seed=1, **FACTS), spec("mlp", {"width": 8}, seed=2, **FACTS)]
    experts = [s.build().eval() for s in specs]
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mixture = Mixture(experts, Gate(64, 2, 2))
    torch.testing.assert_close(mixture(x), Ensemble(experts, combine="mean_logits", num_classes=3)(x))


def test_experts_that_do_not_count_get_no_gradient() -> None:
    made = gate([[1.0], [2.0], [0.0]], [0.0, 0.0, 0.0], 1)
    made(torch.tensor([[2.0]])).sum().backward()
    assert made.linear.bias.grad is not None
    assert made.linear.bias.grad.tolist() == [0.0, 1.0, 0.0]


def test_a_recipe_builds_it_again() -> None:
    first = spec("cnn", {"width": 4, "depth": 2}, seed=1, **FACTS)
    mixture = Mixture([first.build() for _ in range(3)], Gate(64, 3, 2), recipes=[first.recipe] * 3).eval()
    nn.init.normal_(mixture.gate.linear.weight, generator=torch.Generator().manual_seed(1))
    again = build(mixture.recipe)
    again.load_state_dict(mixture.state_dict())
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again.eval()(x), mixture(x))
    assert again.recipe == mixture.recipe


@pytest.mark.parametrize("top_k", [0, 3])
def test_a_wrong_number_of_experts_is_refused(top_k: int) -> None:
    with pytest.raises(ModelError) as caught:
        Gate(4, 2, top_k)
    assert str(caught.value) == (
        f"top_k is {top_k} and there are 2 experts\n  fix:   give a number from 1 to that of experts"
    )
