"""DP-SGD: what it computes, what it spends, and what it refuses."""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.core.errors import ConfigError, TaskError
from fedfuse.core.examples import Examples
from fedfuse.core.seeding import Rng
from fedfuse.core.settings import from_json, to_json
from fedfuse.training import LocalSGD, train
from fedfuse.training.private_sgd import PrivateTraining, training_epsilon

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("opacus")

CPU = torch.device("cpu")


def linear() -> nn.Linear:
    module = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(module.weight)
    return module


def examples(n: int) -> Examples:
    draw = torch.Generator().manual_seed(0)
    return Examples(torch.randn(n, 2, generator=draw), torch.randint(0, 2, (n,), generator=draw))


def run(module: nn.Module, data: Examples, rng: Rng | None = None, **settings: Any) -> dict[str, Tensor]:
    local = LocalSGD(**{"num_epochs": 1, "batch_size": len(data), "momentum": 0.0, **settings})
    return train(module, data, local, rng=rng or Rng(0), device=CPU)


def clipped_mean(data: Examples, most: float) -> Tensor:
    """The mean of the gradients at zero, each clipped by hand: (p - onehot) x^T with p = 1/2."""
    residuals = 0.5 - F.one_hot(data.y, 2).float()
    gradients = residuals[:, :, None] * data.x[:, None, :]
    norms = gradients.flatten(1).norm(dim=1)
    return (gradients * (most / norms).clamp(max=1)[:, None, None]).mean(0)


@pytest.mark.parametrize("most", [0.1, 0.7, 100.0])
def test_a_step_without_noise_is_the_mean_of_the_clipped_gradients(most: float) -> None:
    data, module = examples(12), linear()
    # All examples are drawn where a batch is all of them.
    run(module, data, learning_rate=1.0, privacy=PrivateTraining(max_grad_norm=most, noise_multiplier=1e-9))

    assert torch.allclose(-module.weight.detach(), clipped_mean(data, most), atol=1e-5)


def test_the_noise_has_the_declared_deviation() -> None:
    n, sigma, most = 8, 50.0, 0.5
    data = Examples(torch.ones(n, 1), torch.zeros(n, dtype=torch.int64))
    module = nn.Linear(1, 4000, bias=False)
    nn.init.zeros_(module.weight)
    run(module, data, learning_rate=1.0, privacy=PrivateTraining(max_grad_norm=most, noise_multiplier=sigma))
    z = module.weight.detach().double() / (sigma * most / n)

    # The gradient itself is a fiftieth of a deviation at most, all numbers together.
    assert abs(float((z**2).sum()) - 4000) < 5 * math.sqrt(8000)
    assert abs(float(z.mean())) < 5 / math.sqrt(4000)


def test_the_spent_epsilon_is_the_accountants() -> None:
    privacy = PrivateTraining(noise_multiplier=1.1)
    curves = run(linear(), examples(40), batch_size=10, num_epochs=3, privacy=privacy)
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    for _ in range(12):
        accountant.step(noise_multiplier=1.1, sample_rate=0.25)
    assert list(curves) == ["epsilon"]
    assert curves["epsilon"].item() == pytest.approx(accountant.get_epsilon(delta=1e-5), rel=1e-6)
    assert training_epsilon(PrivateTraining(noise_multiplier=1.1, accountant="prv"), 1.1, 0.25, 12) == pytest.approx(
        curves["epsilon"].item(), rel=0.2
    )


def test_a_target_is_kept_and_shared_by_exchanges() -> None:
    local = LocalSGD(num_epochs=4, batch_size=10, privacy=PrivateTraining(epsilon=6.0))
    whole = train(linear(), examples(40), local, rng=Rng(0), device=CPU)["epsilon"].item()
    part = train(linear(), examples(40), local, rng=Rng(0), device=CPU, num_epochs=1)["epsilon"].item()

    assert 0.99 * 6.0 <= whole <= 6.0
    assert 0.99 * 1.5 <= part <= 1.5


def test_the_noise_is_repeatable_and_needs_the_secret() -> None:
    def weights(rng: Rng) -> Tensor:
        module = linear()
        run(module, examples(20), rng, batch_size=5, privacy=PrivateTraining(noise_multiplier=1.0))
        return module.weight.detach()

    assert torch.equal(weights(Rng(3)), weights(Rng(3)))
    assert torch.equal(weights(Rng(3, b"s" * 32)), weights(Rng(3, b"s" * 32)))
    assert not (weights(Rng(3)) == weights(Rng(3, b"s" * 32))).any()


def test_steps_in_which_nobody_is_drawn_are_noise() -> None:
    data, module = examples(2), linear()
    run(module, data, batch_size=1, num_epochs=8, privacy=PrivateTraining(noise_multiplier=1.0))

    assert module.weight.isfinite().all()
    assert (module.weight != 0).all()


def test_the_module_is_left_as_a_plain_one() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    before = set(vars(next(module.parameters())))
    data = Examples(torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2)
    run(module, data, batch_size=3, privacy=PrivateTraining(noise_multiplier=1.0))

    assert set(vars(next(module.parameters()))) == before
    assert not any(layer._forward_hooks or layer._backward_hooks for layer in module.modules())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_without_the_section_nothing_changes() -> None:
    plain = LocalSGD()

    assert plain.privacy is None
    assert to_json(plain)["privacy"] is None
    assert from_json(LocalSGD, {"privacy": {"epsilon": 3}}, where="method.local").privacy == PrivateTraining(epsilon=3)


def test_batchnorm_is_refused() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))

    with pytest.raises(TaskError) as caught:
        run(module, examples(4), privacy=PrivateTraining(epsilon=1.0))
    assert str(caught.value) == (
        "BatchNorm mixes the examples of a batch, so no example's gradient can be bounded\n"
        "  where: method.local.privacy\n"
        "  fix:   set model.norm: group"
    )


class Collecting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.detach().sum(0)
        return self.inner(x)


def test_statistics_without_noise_are_refused() -> None:
    with pytest.raises(TaskError, match="the model's buffers changed while it was trained, and no noise covers them"):
        run(Collecting(), examples(4), privacy=PrivateTraining(noise_multiplier=1.0))


def test_what_opacus_cannot_train_is_refused() -> None:
    module = nn.ModuleDict({"attention": nn.MultiheadAttention(2, 1)})

    with pytest.raises(TaskError, match="opacus cannot train this model privately: ") as caught:
        run(module, examples(4), privacy=PrivateTraining(noise_multiplier=1.0))
    assert caught.value.where == "method.local.privacy"
    assert caught.value.fix == "use another model, or privacy.mechanism: local, which takes any"


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("patience", 2, "early stopping looks at the data without noise"),
        ("grad_clip_norm", 1.0, "private training clips every example already"),
        ("precision", "bf16", "gradients of single examples are computed in fp32"),
        ("compile", True, "gradients of single examples cannot be compiled"),
    ],
)
def test_settings_that_would_make_it_untrue_are_refused(setting: str, value: Any, message: str) -> None:
    with pytest.raises(TaskError) as caught:
        run(linear(), examples(4), privacy=PrivateTraining(epsilon=1.0), **{setting: value})
    assert str(caught.value) == (
        f"{message}\n  where: method.local.{setting}\n  fix:   leave {setting} out, or leave privacy out"
    )


def test_a_loss_of_the_methods_own_is_refused() -> None:
    local = LocalSGD(privacy=PrivateTraining(epsilon=1.0))

    with pytest.raises(TaskError, match="this method's loss has terms that belong to no single example"):
        train(linear(), examples(4), local, rng=Rng(0), device=CPU, loss=lambda module, x, y: module(x).sum())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, ("the noise is not determined\n  where: method.local.privacy\n  fix:   give either noise_multiplier or "
         "epsilon")),
        ({"epsilon": -1}, "epsilon is -1\n  where: method.local.privacy.epsilon\n  fix:   give a number above 0"),
        ({"epsilon": 1, "delta": 0}, ("delta is 0\n  where: method.local.privacy.delta\n  fix:   give a number between "
         "0 and 1")),
    ],
)  # fmt: skip
def test_wrong_settings_are_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(LocalSGD, {"privacy": settings}, where="method.local")
    assert str(caught.value) == message


def test_without_opacus_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "opacus" or name.startswith("opacus.")]:
        monkeypatch.setitem(sys.modules, name, None)

    with pytest.raises(ConfigError) as caught:
        run(linear(), examples(4), privacy=PrivateTraining(epsilon=1.23))
    assert str(caught.value) == (
        'private training needs opacus\n  where: method.local.privacy\n  fix:   pip install "fedfuse[privacy]"'
    )
