"""Losses of distillation and synthesis, redone by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedfuse.ops.distillation import (
    batch_information,
    batchnorm_distance,
    boosted_weights,
    channel_moments,
    disagreement,
    hard_sample_cross_entropy,
    jensen_shannon,
    kd_divergence,
    mean_activation,
    output_diversity_direction,
    total_variation,
)

SEEDS = st.integers(0, 10_000)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kd_temperature", [1.0, 4.0])
def test_divergence_of_three_quarters_from_one_half(kd_temperature: float) -> None:
    # softmax(T ln 3 / T, 0) = (3/4, 1/4).
    teacher = torch.tensor([[kd_temperature * math.log(3), 0.0]])
    wanted = kd_temperature**2 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    found = kd_divergence(torch.zeros(1, 2), teacher, kd_temperature)
    torch.testing.assert_close(found, torch.tensor([wanted]))


@given(SEEDS)
def test_divergences_are_positive_and_zero_for_equal_answers(seed: int) -> None:
    a, b = random(5, 4, seed=seed), random(5, 4, seed=seed + 1)
    assert (kd_divergence(a, b, 3.0) >= -1e-6).all()
    assert kd_divergence(a, a + 2.0, 3.0).abs().max() < 1e-5
    spread = jensen_shannon(a, b, 2.0)
    assert (spread >= -1e-6).all()
    assert (spread <= math.log(2) + 1e-6).all()
    torch.testing.assert_close(spread, jensen_shannon(b, a, 2.0))


def test_certain_and_opposite_answers_are_ln_2_apart() -> None:
    sure = torch.tensor([[100.0, -100.0]])
    torch.testing.assert_close(jensen_shannon(sure, -sure), torch.tensor([math.log(2)]))
    torch.testing.assert_close(jensen_shannon(sure, sure), torch.zeros(1))


def test_disagreement_marks_other_predictions() -> None:
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    teacher = torch.tensor([[9.0, 0.0], [0.0, 1.0]])
    assert disagreement(student, teacher).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (4, 3, 5, 2)])
def test_moments_and_their_gradients_are_those_of_torch(shape: tuple[int, ...]) -> None:
    x, others = random(*shape), tuple(d for d in range(len(shape)) if d != 1)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    mean, var = channel_moments(a)
    wanted_var, wanted_mean = torch.var_mean(b, others, correction=0)
    torch.testing.assert_close(mean, wanted_mean)
    torch.testing.assert_close(var, wanted_var)
    scales = random(3, seed=4)
    (mean * scales + var.square()).sum().backward()
    (wanted_mean * scales + wanted_var.square()).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_moments_of_other_layouts_and_of_half_precision() -> None:
    x = random(8, 6, 4, 4) * 3 + 1
    plain = channel_moments(x)
    for other in (x.contiguous(memory_format=torch.channels_last), x.bfloat16()):
        for found, wanted in zip(channel_moments(other), plain, strict=True):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
    half = x.bfloat16().requires_grad_()
    sum(part.sum() for part in channel_moments(half)).backward()  # type: ignore[union-attr]
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_a_channel_without_spread_has_variance_0_and_a_gradient() -> None:
    x = torch.full((4, 1, 2, 2), 3.0, requires_grad=True)
    mean, var = channel_moments(x)
    assert (mean.item(), var.item()) == (3.0, 0.0)
    batchnorm_distance(mean, var, torch.tensor([3.0]), torch.tensor([0.0])).backward()
    assert x.grad is not None
    assert x.grad.abs().max() == 0


def test_the_distance_is_5_for_3_and_4_and_13_more_for_5_and_12() -> None:
    mean, var = torch.tensor([3.0, 4.0]), torch.tensor([6.0, 13.0])
    found = batchnorm_distance(mean, var, torch.zeros(2), torch.ones(2))
    assert found.item() == 5.0 + 13.0
    assert batchnorm_distance(mean, var, mean, var).item() == 0.0


def test_a_hard_sample_counts_by_what_is_not_believed() -> None:
    logits = torch.tensor([[math.log(3), 0.0]], requires_grad=True)
    # p = 1/4: the weight is 3/4 and carries no gradient; cross-entropy's own is (3/4, -3/4).
    loss = hard_sample_cross_entropy(logits, torch.tensor([1]))
    torch.testing.assert_close(loss, torch.tensor([0.75 * math.log(4)]))
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, 0.75 * torch.tensor([[0.75, -0.75]]))
    plain = hard_sample_cross_entropy(logits, torch.tensor([1]), power=0.0)
    torch.testing.assert_close(plain, torch.tensor([math.log(4)]))


def test_the_direction_of_a_linear_network() -> None:
    # Two classes: the gradient of r . softmax(x W) is p0 p1 (r0 - r1) (w0 - w1) / T.
    weight = torch.tensor([[1.0, -1.0], [2.0, 5.0], [0.5, 0.5]])
    x, direction = random(4, 3), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, -0.5], [0.3, 0.3]])
    found = output_diversity_direction(x, lambda seen: seen @ weight, direction)
    assert found[:3].tolist() == [[1, -1, 0], [-1, 1, 0], [1, -1, 0]]
    assert not found.requires_grad


def test_weights_step_towards_the_member_that_is_right() -> None:
    logits = torch.tensor([[[4.0, 0.0]], [[0.0, 4.0]]])
    start = torch.tensor([0.5, 0.5])
    moved = boosted_weights(start, start, logits, torch.tensor([0]), 0.01)
    torch.testing.assert_close(moved, torch.tensor([0.51, 0.49]))
    near_the_end = torch.tensor([0.999, 0.001])
    moved = boosted_weights(near_the_end, start, logits, torch.tensor([0]), 0.01)
    torch.testing.assert_close(moved, torch.tensor([1.0, 0.0]))
    held = boosted_weights(near_the_end, start, logits, torch.tensor([0]), 0.01, largest_change=0.1)
    torch.testing.assert_close(held, torch.tensor([0.6, 0.4]))


def test_the_last_member_is_never_lost() -> None:
    # The worse member alone is left and would be moved to 0.
    weights = torch.tensor([0.005, 0.0])
    logits = torch.tensor([[[0.0, 4.0]], [[4.0, 0.0]]])
    moved = boosted_weights(weights, weights, logits, torch.tensor([0]), 0.01)
    assert moved.sum() > 0


@given(SEEDS, st.integers(1, 5))
def test_weights_stay_weights(seed: int, num_members: int) -> None:
    logits, labels = random(num_members, 6, 3, seed=seed), torch.arange(6) % 3
    start = torch.full((num_members,), 1 / num_members)
    weights = start
    for _ in range(20):
        weights = boosted_weights(weights, start, logits, labels, 0.1)
        assert (weights >= 0).all()
        assert (weights <= 1).all()
        assert weights.sum() > 0


def test_information_is_largest_for_equal_parts() -> None:
    sure = 1000.0 * torch.eye(4)
    assert batch_information(sure).item() == pytest.approx(math.log(4), abs=1e-6)
    assert batch_information(sure[:1].repeat(4, 1)).item() == pytest.approx(0.0, abs=1e-6)
    assert batch_information(sure[:2]).item() == pytest.approx(math.log(2), abs=1e-6)


def test_mean_activation() -> None:
    assert mean_activation(torch.tensor([[1.0, -3.0], [0.0, 4.0]])).item() == 2.0


def test_variation_of_a_ramp_and_of_a_single_pixel() -> None:
    ramp = torch.arange(5.0).expand(1, 2, 3, 5)
    assert total_variation(ramp).item() == 1.0
    assert total_variation(torch.ones(1, 1, 1, 1)).item() == 0.0
