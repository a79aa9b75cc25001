"""What local steps did, against torch's own SGD."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse.ops.local_steps import gradient_weights, squared_distance, tilt


def test_momentum_by_hand() -> None:
    # Three steps of rate 1 and momentum 0.5: the first gradient enters all three velocities, 1 + 0.5 + 0.25.
    assert gradient_weights([1.0, 1.0, 1.0], 0.5).tolist() == [1.75, 1.5, 1.0]
    # A rate that falls to 0 leaves the last gradient without weight: 1 + 0.5 * 0.5, 0.5, 0.
    assert gradient_weights([1.0, 0.5, 0.0], 0.5).tolist() == [1.25, 0.5, 0.0]
    assert gradient_weights([], 0.9).tolist() == []


def test_the_sum_is_fednovas_closed_form_for_a_constant_rate() -> None:
    # Wang et al., 2020: |a|_1 = (t - m (1 - m^t) / (1 - m)) / (1 - m), times the rate.
    steps, momentum, rate = 7, 0.9, 0.1
    wanted = rate * (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)
    assert float(gradient_weights([rate] * steps, momentum).sum()) == pytest.approx(wanted)


@settings(max_examples=20, deadline=None)
@given(
    rates=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6),
    momentum=st.floats(0.0, 0.95),
    seed=st.integers(0, 1000),
)
def test_torchs_sgd_moves_by_the_weighted_gradients(rates: list[float], momentum: float, seed: int) -> None:
    gradients = torch.randn(len(rates), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weights], lr=1.0, momentum=momentum)
    for rate, gradient in zip(rates, gradients, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        weights.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(weights.detach(), -gradient_weights(rates, momentum) @ gradients)


def test_tilt_bends_the_gradient_and_leaves_the_value() -> None:
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    value = w.square().sum() + tilt([w], [torch.tensor([10.0, 20.0])])
    assert value.item() == 5.0
    assert torch.autograd.grad(value, w)[0].tolist() == [12.0, 16.0]


def test_squared_distance_over_several_tensors() -> None:
    assert squared_distance([torch.ones(2, 2), torch.ones(1)], [torch.zeros(2, 2), -torch.ones(1)]).item() == 8.0
