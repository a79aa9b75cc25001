"""A student that learns from teachers' answers."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import pytest
import torch
from torch import nn

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.models import spec
from fedfuse.training.distillation import (
    Distillation,
    Learner,
    check_loss,
    optimizer_memory,
    restore_optimizer,
)

CPU = torch.device("cpu")


def student() -> nn.Module:
    return spec("cnn", {"width": 4}, input_shape=(1, 8, 8), num_classes=3, seed=2).build()


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 1, 8, 8, generator=generator), torch.randn(8, 3, generator=generator)


def test_one_step_in_closed_form() -> None:
    # Logits W x with x = 1 and W = 0: the gradient of T^2 KL is T (softmax(W / T) - target) per example.
    layer = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(layer.weight)
    learner = Learner(layer, Distillation(learning_rate=0.1, momentum=0.0, kd_temperature=2.0), CPU)
    target = torch.tensor([[2.0 * math.log(3), 0.0]])
    loss = learner.step(torch.ones(1, 1), target)
    torch.testing.assert_close(loss, torch.tensor(4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))))
    torch.testing.assert_close(layer.weight.detach(), 0.1 * 2.0 * torch.tensor([[0.25], [-0.25]]))


def test_gradients_are_clipped_to_the_norm() -> None:
    layer = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(layer.weight)
    Learner(layer, Distillation(learning_rate=1.0, momentum=0.0, grad_clip_norm=0.01), CPU).step(
        torch.ones(1, 1), torch.tensor([[50.0, 0.0]])
    )
    assert layer.weight.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_the_schedule_goes_down_to_0_as_a_cosine() -> None:
    learner = Learner(student(), Distillation(learning_rate=0.2, schedule="cosine"), CPU)
    rates = []
    for done in (0.0, 0.5, 1.0):
        learner.schedule(done)
        rates.append(learner.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.2, 0.1, 0.0])
    constant = Learner(student(), Distillation(learning_rate=0.2), CPU)
    constant.schedule(0.9)
    assert constant.optimizer.param_groups[0]["lr"] == 0.2


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_student_with_its_memory_goes_on_with_the_same_bits(optimizer: Literal["sgd", "adam"]) -> None:
    settings = Distillation(optimizer=optimizer, weight_decay=1e-4)
    first = Learner(student(), settings, CPU)
    for seed in range(2):
        first.step(*batch(seed))
    second = Learner(student(), settings, CPU)
    second.student.load_state_dict(copy.deepcopy(first.student.state_dict()))
    # A file does not keep the order of dimensions in memory.
    second.remember({name: tensor.contiguous() for name, tensor in first.memory().items()})
    for learner in (first, second):
        learner.step(*batch(5))
    for name, tensor in first.student.state_dict().items():
        assert torch.equal(tensor, second.student.state_dict()[name]), name


def test_the_memory_is_a_copy() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.grad = torch.ones(2)
    optimizer.step()
    memory = optimizer_memory(optimizer)
    assert list(memory) == ["0.momentum_buffer"]
    optimizer.step()
    assert memory["0.momentum_buffer"].tolist() == [1.0, 1.0]
    restore_optimizer(optimizer, memory)
    assert optimizer.state[parameter]["momentum_buffer"].tolist() == [1.0, 1.0]


def test_half_precision_computes_nearly_the_same_and_keeps_parameters_whole() -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        learner = Learner(student(), Distillation(precision=precision), CPU)
        losses.append(learner.step(*batch()).item())
        assert all(p.dtype == torch.float32 for p in learner.student.parameters())
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"batch_size": 1}, "batch_size is 1\n  where: distillation.batch_size\n  fix:   give at least 2"),
        ({"num_batches": 0}, "num_batches is 0\n  where: distillation.num_batches\n  fix:   give at least 1"),
        ({"momentum": 1.0}, "momentum is 1.0\n  where: distillation.momentum\n  fix:   give a number in [0, 1)"),
        (
            {"kd_temperature": 0.0},
            "kd_temperature is 0.0\n  where: distillation.kd_temperature\n  fix:   give a number above 0",
        ),
        (
            {"learning_rate": float("nan")},
            "learning_rate is nan\n  where: distillation.learning_rate\n  fix:   give a number above 0",
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Distillation(**settings)
    assert str(caught.value) == wanted


def test_a_loss_that_is_not_finite_is_said() -> None:
    check_loss(1.0, "distillation")
    with pytest.raises(DataError) as caught:
        check_loss(float("nan"), "distillation")
    assert str(caught.value) == (
        "the server's training diverged: the loss is nan\n  where: distillation\n"
        "  fix:   lower distillation.learning_rate, or set distillation.grad_clip_norm"
    )
