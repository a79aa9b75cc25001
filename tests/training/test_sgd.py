"""Local training: numbers that a reader can redo by hand, and the same bits every time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.examples import Examples
from fedfuse.core.seeding import Rng
from fedfuse.training import LocalSGD, train
from fedfuse.training.sgd import batches

CPU = torch.device("cpu")


def examples(n: int = 40, seed: int = 0) -> Examples:
    """Two classes that a line separates."""
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    return Examples(x, (x[:, 0] + x[:, 1] > 0).long())


def model(seed: int = 0) -> nn.Sequential:
    with Rng(seed).ambient("model"):
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(a[name].equal(b[name]) for name in a)


def fit(module: nn.Module, data: Examples | None = None, seed: int = 0, **changes: Any) -> dict[str, Tensor]:
    names = LocalSGD.__dataclass_fields__
    chosen = LocalSGD(**{"num_epochs": 3, "batch_size": 8, **{k: v for k, v in changes.items() if k in names}})
    more = {k: v for k, v in changes.items() if k not in names}
    return train(module, examples() if data is None else data, chosen, rng=Rng(seed), device=CPU, **more)


class Point(nn.Module):
    """One number, whose gradient a test decides."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([-self.w, self.w]).expand(len(x), 2)


def slope_one(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return module.w  # type: ignore[return-value]


# --- learning


def test_the_loss_goes_down_and_the_curve_says_so() -> None:
    curves = fit(model(), num_epochs=15, learning_rate=0.1)
    assert list(curves) == ["train_loss"]
    assert curves["train_loss"].shape == (15,)
    assert float(curves["train_loss"][-1]) < 0.3 * float(curves["train_loss"][0])


def test_one_step_by_hand() -> None:
    # Logits are 0, so the loss is log 2 and the gradient of each logit is (1/2 - [right]).
    module = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(module.weight)
    data = Examples(torch.tensor([[2.0], [2.0]]), torch.tensor([1, 1]))
    curves = fit(module, data, num_epochs=1, learning_rate=0.5)
    assert curves["train_loss"].tolist() == pytest.approx([math.log(2)])
    assert module.weight.flatten().tolist() == pytest.approx([-0.5, 0.5])


def test_momentum_and_weight_decay_by_hand() -> None:
    # g = 1: v = 1, then 0.5 + 1: w = -0.1 - 0.15.
    one = Point()
    fit(one, examples(8), num_epochs=2, learning_rate=0.1, momentum=0.5, loss=slope_one)
    assert one.w.item() == pytest.approx(-0.25)
    # g = 1 + 0.5 w: w = 2 - 0.1 * 2, then minus 0.1 * 1.9.
    two = Point(2.0)
    fit(two, examples(8), num_epochs=2, learning_rate=0.1, momentum=0.0, weight_decay=0.5, loss=slope_one)
    assert two.w.item() == pytest.approx(1.61)


def test_the_cosine_schedule_by_hand() -> None:
    # Four steps at rates (1 + cos(0, 45, 90, 135 degrees)) / 2, which sum to 2.5; a constant rate gives 4.
    for schedule, wanted in (("cosine", 2.5), ("constant", 4.0)):
        module = Point()
        fit(module, examples(16), num_epochs=2, learning_rate=1.0, momentum=0.0, schedule=schedule, loss=slope_one)
        assert module.w.item() == pytest.approx(-wanted)


def test_a_gradient_is_clipped() -> None:
    module = Point()
    fit(module, examples(8), num_epochs=1, learning_rate=1.0, momentum=0, grad_clip_norm=0.25, loss=slope_one)
    assert module.w.item() == pytest.approx(-0.25, rel=1e-4)


def test_the_number_of_epochs_may_be_given() -> None:
    told: list[tuple[int, int]] = []
    curves = fit(model(), num_epochs=9, progress=lambda done, total: told.append((done, total)))
    assert len(curves["train_loss"]) == 9
    assert told == [(epoch, 9) for epoch in range(1, 10)]
    settings = LocalSGD(num_epochs=9)
    assert len(train(model(), examples(), settings, rng=Rng(0), device=CPU, num_epochs=2)["train_loss"]) == 2


# --- the same bits


def test_the_same_source_of_randomness_gives_the_same_bits() -> None:
    first, second, other = model(), model(), model()
    curves = fit(first), fit(second)
    fit(other, seed=1)
    assert equal(state(first), state(second))
    assert curves[0]["train_loss"].equal(curves[1]["train_loss"])
    assert not equal(state(first), state(other))


def test_nothing_is_drawn_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    fit(model())
    assert torch.get_rng_state().equal(before)


def test_frozen_parameters_stay_bit_for_bit() -> None:
    module = model()
    module[0].requires_grad_(False)
    before = state(module)
    fit(module, weight_decay=0.1)
    assert module[0].weight.equal(before["0.weight"])
    assert module[0].bias.equal(before["0.bias"])
    assert not module[3].weight.equal(before["3.weight"])


def test_the_examples_are_left_as_they_are() -> None:
    data = examples()
    before = data.x.clone()
    fit(model(), data)
    assert data.x.equal(before)


# --- precision and memory format


def test_mixed_precision_keeps_parameters_in_single() -> None:
    whole, mixed = model(), model()
    fit(whole, num_epochs=5)
    curves = fit(mixed, num_epochs=5, precision="bf16")
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}
    assert curves["train_loss"].dtype == torch.float32
    assert not equal(state(whole), state(mixed))
    for name, value in state(whole).items():
        torch.testing.assert_close(state(mixed)[name], value, rtol=0.1, atol=0.1)


def test_the_memory_format_of_images_changes_little() -> None:
    data = Examples(torch.randn(12, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2)
    found = []
    for channels_last in (True, False):
        with Rng(0).ambient("model"):
            module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2))
        fit(module, data, channels_last=channels_last)
        found.append(state(module))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-5)


# --- validation


def test_validation_curves() -> None:
    curves = fit(model(), validation=examples(20, seed=1))
    assert set(curves) == {"train_loss", "validation_loss", "validation_accuracy"}
    assert all(len(values) == 3 for values in curves.values())


def test_watching_the_validation_part_changes_no_bit() -> None:
    watched, alone = model(), model()
    fit(watched, validation=examples(20, seed=1))
    fit(alone)
    assert equal(state(watched), state(alone))


def test_an_empty_validation_part_is_not_watched() -> None:
    empty = Examples(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert list(fit(model(), validation=empty, patience=1)) == ["train_loss"]


def test_patience_stops_and_puts_the_best_weights_back() -> None:
    # Gradient ascent: the first epoch is the best one.
    def ascent(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return -nn.functional.cross_entropy(module(x), y)

    stopped, best = model(), model()
    curves = fit(stopped, num_epochs=20, patience=2, validation=examples(20, seed=1), loss=ascent)
    assert len(curves["train_loss"]) == len(curves["validation_loss"]) == 3
    assert curves["validation_loss"].argmin() == 0
    fit(best, num_epochs=1, loss=ascent)
    assert equal(state(stopped), state(best))


def test_patience_waits_while_the_loss_goes_down() -> None:
    curves = fit(model(), num_epochs=6, patience=1, validation=examples(), learning_rate=0.005)
    assert len(curves["train_loss"]) == 6


def test_the_best_weights_are_put_back_at_the_end_too() -> None:
    # A parabola around 1 with steps that jump over it ever further: the start of the second epoch is the nearest.
    def loss(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return module.w  # type: ignore[return-value]

    ones = Examples(torch.zeros(8, 4), torch.zeros(8, dtype=torch.int64))
    half = Examples(torch.zeros(4, 4), torch.tensor([0, 0, 0, 1]))
    # Logits are (-w, w); with a quarter of ones the loss is least at w = -log(3) / 2, about -0.55.
    module = Point(0.0)
    curves = fit(module, ones, num_epochs=4, learning_rate=0.3, momentum=0.0, patience=9, validation=half, loss=loss)
    assert int(curves["validation_loss"].argmin()) == 1
    assert module.w.item() == pytest.approx(-0.6)


# --- what cannot be trained


def test_nothing_to_train_on() -> None:
    with pytest.raises(DataError) as caught:
        fit(model(), Examples(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)))
    assert str(caught.value) == (
        "there are no examples to train on\n  fix:   give every client at least one training example"
    )


def test_divergence_is_told() -> None:
    with pytest.raises(DataError) as caught:
        fit(nn.Linear(4, 2), learning_rate=1e38)
    assert caught.value.what.startswith("training diverged: the loss is ")
    assert caught.value.fix == "lower method.local.learning_rate, or set method.local.grad_clip_norm"
    with pytest.raises(DataError) as caught:
        fit(Point(), loss=lambda module, x, y: module.w + math.nan)
    assert caught.value.what == "training diverged: the loss is nan in epoch 1"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"num_epochs": 0}, "num_epochs is 0\n  where: local.num_epochs\n  fix:   give at least 1"),
        ({"batch_size": 0}, "batch_size is 0\n  where: local.batch_size\n  fix:   give at least 1"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1\n  where: local.weight_decay\n  fix:   give at least 0"),
        ({"momentum": -0.1}, "momentum is -0.1\n  where: local.momentum\n  fix:   give at least 0"),
        (
            {"learning_rate": 0.0},
            (
                "learning_rate 0.0 and momentum 0.9 cannot train\n  where: local\n"
                "  fix:   give a learning_rate above 0 and a momentum below 1"
            ),
        ),
        (
            {"momentum": 1.0},
            (
                "learning_rate 0.01 and momentum 1.0 cannot train\n  where: local\n"
                "  fix:   give a learning_rate above 0 and a momentum below 1"
            ),
        ),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LocalSGD(**settings)
    assert str(caught.value) == text


# --- few examples


@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_normalisation_trains_on_any_number_of_examples(count: int, batch_size: int) -> None:
    module = model()
    curves = fit(module, examples(count), batch_size=batch_size)
    assert all(bool(torch.isfinite(value).all()) for value in state(module).values())
    assert bool(torch.isfinite(curves["train_loss"]).all())


@pytest.mark.parametrize(("count", "batch_size"), [(1, 8), (3, 1), (9, 8), (8, 8)])
def test_the_curve_is_a_mean_over_examples_however_they_are_batched(count: int, batch_size: int) -> None:
    curves = fit(Point(2.0), examples(count), batch_size=batch_size, num_epochs=1, learning_rate=1e-9, loss=slope_one)
    assert curves["train_loss"].tolist() == pytest.approx([2.0])


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 100))
def test_every_example_is_in_one_batch_and_no_batch_has_one(count: int, batch_size: int, seed: int) -> None:
    found = list(batches(count, batch_size, torch.Generator().manual_seed(seed)))
    assert all(2 <= len(each) <= max(2, batch_size + 1) for each in found)
    positions = torch.cat(found).tolist()
    assert set(positions) == set(range(count))
    if count > 1 and batch_size > 1:
        assert len(positions) == count
    assert torch.cat(list(batches(count, batch_size, torch.Generator().manual_seed(seed)))).tolist() == positions


# --- dividing the epochs


@given(st.integers(1, 60), st.integers(1, 60))
def test_the_parts_add_up_to_the_whole(num_epochs: int, num_parts: int) -> None:
    settings = LocalSGD(num_epochs=num_epochs)
    if num_epochs < num_parts:
        with pytest.raises(ConfigError) as caught:
            settings.share(0, num_parts)
        assert str(caught.value) == (
            f"{num_epochs} local epochs cannot be divided over {num_parts} exchanges\n"
            f"  where: method.local.num_epochs\n  fix:   give at least {num_parts}"
        )
    else:
        parts = [settings.share(part, num_parts) for part in range(num_parts)]
        assert sum(parts) == num_epochs
        assert parts == sorted(parts, reverse=True)
        assert max(parts) - min(parts) <= 1
