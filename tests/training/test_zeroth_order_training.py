"""Training by loss differences, on losses whose slopes are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.examples import Examples
from fedfuse.core.seeding import Rng
from fedfuse.ops.zeroth_order import shift, shift_by_sums
from fedfuse.training.zeroth_order import LocalZerothOrder, Slopes, train_without_gradients

CPU = torch.device("cpu")


class Bowl(nn.Module):
    """Half the squared distance of its weights to 1, whatever the examples say; one weight is frozen."""

    def __init__(self, curvature: float = 1.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(5, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.full((2,), 7.0), requires_grad=False)
        self.curvature = curvature

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * self.curvature * ((self.w - 1) ** 2).sum()


def trained(module: nn.Module, examples: Examples | None = None, num_steps: int = 20, **settings: Any) -> Slopes:
    six = Examples(torch.zeros(6, 3), torch.arange(6) % 2)
    return train_without_gradients(
        module,
        six if examples is None else examples,
        LocalZerothOrder(**{"learning_rate": 0.1, "batch_size": 4, **settings}),
        num_steps=num_steps,
        probabilities=torch.full((8,), 1 / 8),
        directions=Rng(1),
        rng=Rng(2),
        device=CPU,
    )


def test_a_step_follows_the_slope_along_its_direction() -> None:
    module = Bowl()
    found = trained(module, num_steps=1)

    number = int(found.counts.argmax())
    direction = torch.zeros(5, dtype=torch.float64)
    shift([direction], Rng(1), number, 1.0)
    # A parabola's difference is its slope at the middle: the gradient at 0 is -1 in every entry.
    slope = -direction.sum().item()
    assert found.sums[number].item() == pytest.approx(slope, abs=1e-5)
    assert found.sizes[number].item() == pytest.approx(abs(slope), abs=1e-5)
    torch.testing.assert_close(module.w.detach(), -0.1 * slope * direction, rtol=0, atol=1e-6)
    assert module.frozen.tolist() == [7.0, 7.0]


def test_the_slopes_are_all_that_is_needed_to_make_the_trained_weights_again() -> None:
    module = Bowl()
    found = trained(module, num_steps=60)

    again = [torch.zeros(5, dtype=torch.float64)]
    shift_by_sums(again, Rng(1), dict(enumerate(found.sums.tolist())), -0.1)
    torch.testing.assert_close(again[0], module.w.detach(), rtol=0, atol=1e-12)
    assert int(found.counts.sum()) == 60
    assert found.losses[-1] < 0.05 * found.losses[0]


def test_a_seed_that_has_no_probability_is_not_taken() -> None:
    only = torch.zeros(8)
    only[3] = 1.0
    found = train_without_gradients(
        Bowl(),
        Examples(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)),
        LocalZerothOrder(),
        num_steps=5,
        probabilities=only,
        directions=Rng(1),
        rng=Rng(2),
        device=CPU,
    )
    assert found.counts.tolist() == [0, 0, 0, 5, 0, 0, 0, 0]


def test_both_sides_of_a_step_see_the_same_dropout() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def objective(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.rand(1).sum()  # the weights play no part

    with Rng(0).ambient("task"):
        found = trained(Noisy(), num_steps=10)
    assert not found.sums.any()
    assert found.losses.unique().numel() == 10


def test_one_example_and_batchnorm_go_together() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    found = trained(module, Examples(torch.ones(1, 3), torch.zeros(1, dtype=torch.int64)), num_steps=3)

    assert found.losses.isfinite().all()
    assert int(module[1].num_batches_tracked) == 6


def test_slopes_are_clipped() -> None:
    found = trained(Bowl(), num_steps=30, slope_clip=0.25)
    assert found.sizes.sum().item() <= 30 * 0.25
    assert found.sizes.max().item() >= 0.25


def test_what_diverges_is_told() -> None:
    with pytest.raises(DataError) as caught:
        trained(Bowl(curvature=1e200), num_steps=200)
    assert caught.value.what.startswith("training diverged: the losses are ")
    assert caught.value.fix == "lower method.local.learning_rate, or set method.local.slope_clip"
    with pytest.raises(DataError, match="there are no examples to train on"):
        trained(Bowl(), Examples(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"num_steps": 0}, "num_steps is 0\n  where: local.num_steps\n  fix:   give at least 1"),
        ({"perturbation": 0.0}, "perturbation is 0\n  where: local.perturbation\n  fix:   give a number above 0"),
        ({"slope_clip": -1.0}, "slope_clip is -1\n  where: local.slope_clip\n  fix:   give a number above 0"),
    ],
)
def test_a_wrong_setting_is_told(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LocalZerothOrder(**settings)
    assert str(caught.value) == error


def test_fewer_steps_than_exchanges_are_told() -> None:
    with pytest.raises(ConfigError, match="3 local steps cannot be divided over 4 exchanges"):
        LocalZerothOrder(num_steps=3).share(0, 4)
