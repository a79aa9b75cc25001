"""Linear heads in closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.errors import ConfigError, ModelError
from fedfuse.core.examples import Examples
from fedfuse.core.method import Job
from fedfuse.core.seeding import Rng
from fedfuse.methods.heads import Head, average_head, joint_head, linear
from fedfuse.ops.moments import Moments, class_moments, gaussian_draws, lda_head
from fedfuse.training import LocalSGD, train


def job() -> Job:
    spec = ModelSpec(recipe={"kind": "none"}, seed=0, input_shape=(1,), num_classes=3)
    return Job(model=spec, rng=Rng(4), device=torch.device("cpu"))


def heads(*widths: int, bias: bool = True) -> list[nn.Linear]:
    made = []
    for position, width in enumerate(widths):
        generator = torch.Generator().manual_seed(position)
        layer = nn.Linear(width, 3, bias=bias)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        made.append(layer)
    return made


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9))


@torch.no_grad()
def test_the_joint_head_gives_the_mean_of_the_logits() -> None:
    layers, parts = heads(2, 4, 3), [draw(5, 2), draw(5, 4), draw(5, 3)]
    wanted = torch.stack([layer(part) for layer, part in zip(layers, parts, strict=True)]).mean(0)
    torch.testing.assert_close(joint_head(layers)(torch.cat(parts, 1)), wanted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_average_head_is_the_mean_of_weights_and_biases() -> None:
    layers = heads(2, 2)
    head = average_head(layers)
    torch.testing.assert_close(head.weight, (layers[0].weight + layers[1].weight) / 2)
    torch.testing.assert_close(head.bias, (layers[0].bias + layers[1].bias) / 2)
    x = draw(5, 2)
    torch.testing.assert_close(head(x), (layers[0](x) + layers[1](x)) / 2)


def test_a_head_without_a_bias_counts_as_one_with_zeros() -> None:
    assert average_head(heads(2, 2, bias=False)).bias.tolist() == [0.0] * 3
    assert joint_head(heads(2, 3, bias=False)).bias.tolist() == [0.0] * 3


def test_one_head_is_left_as_it_is() -> None:
    (layer,) = heads(4)
    for made in (average_head([layer]), joint_head([layer])):
        assert torch.equal(made.weight, layer.weight)
        assert torch.equal(made.bias, layer.bias)


def test_heads_of_different_widths_cannot_be_averaged() -> None:
    with pytest.raises(ModelError) as caught:
        average_head(heads(2, 3))
    assert str(caught.value) == (
        "heads of different widths cannot be averaged\n"
        "  fix:   use head.kind: lda or ensemble for clients with different models"
    )


@pytest.mark.parametrize(("kind", "wrong", "wants"), [("average", "concat", "mean"), ("ensemble", "mean", "concat")])
def test_a_head_on_features_that_it_cannot_see_is_refused(kind: Any, wrong: Any, wants: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Head(kind=kind, features=wrong)
    assert str(caught.value) == (
        f"the head {kind} works on {wants} features\n  where: head.features\n  fix:   use features: auto or {wants}"
    )
    assert Head(kind=kind, features=wants).sees == wants  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("head", "sees", "needs_moments", "sends_per_class"),
    [
        (Head(), "concat", True, False),
        (Head(kind="lda", features="mean"), "mean", True, False),
        (Head(kind="calibrated"), "mean", True, True),
        (Head(kind="calibrated", per_class=False, features="concat"), "concat", True, False),
        (Head(kind="average"), "mean", False, False),
        (Head(kind="ensemble"), "concat", False, False),
    ],
)
def test_what_each_kind_sees_and_asks_for(head: Head, sees: str, needs_moments: bool, sends_per_class: bool) -> None:
    assert (head.sees, head.needs_moments, head.sends_per_class) == (sees, needs_moments, sends_per_class)


def test_make_takes_the_kind() -> None:
    layers = heads(2, 2)
    assert torch.equal(Head(kind="average").make(layers, None, job()).weight, average_head(layers).weight)
    assert torch.equal(Head(kind="ensemble").make(layers, None, job()).weight, joint_head(layers).weight)


def test_lda_by_hand() -> None:
    # Two classes on a line, means 0 and 2, ten examples each, within-class scatter 80: variance 80 / 20 = 4.
    # w = mean / variance; b = -mean^2 / (2 variance) + log(1/2).
    counts, means = torch.tensor([10.0, 10.0]).double(), torch.tensor([[0.0], [2.0]]).double()
    moments = Moments(counts, means, torch.tensor([[80.0]]).double())
    head = Head(shrinkage=0.0).make(heads(1, 1), moments, job())
    assert head.weight.tolist() == [[0.0], [pytest.approx(0.5)]]
    assert head.bias.tolist() == pytest.approx([math.log(0.5), -0.5 + math.log(0.5)])
    uniform = Head(shrinkage=0.0, priors="uniform").make(heads(1, 1), moments, job())
    assert uniform.bias.tolist() == pytest.approx([0.0, -0.5])


@pytest.mark.parametrize("shrinkage", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("per_class", [False, True])
def test_lda_is_the_closed_form_of_ops(shrinkage: float | None, per_class: bool) -> None:
    x, y = draw(40, 6), torch.arange(40) % 3
    moments = class_moments(x, y, 3, per_class=per_class)
    weights, biases = lda_head(moments, shrinkage=shrinkage, priors="pooled")
    head = Head(shrinkage=shrinkage).make(heads(3, 3), moments, job())
    assert torch.equal(head.weight.detach(), weights.float())
    assert torch.equal(head.bias.detach(), biases.float())


def test_lda_ignores_the_clients_heads() -> None:
    moments = class_moments(draw(40, 6), torch.arange(40) % 3, 3, per_class=False)
    first, second = Head().make(heads(6), moments, job()), Head().make([linear(*lda_head(moments))], moments, job())
    assert torch.equal(first.weight, second.weight)


@pytest.mark.parametrize("per_class", [False, True])
def test_calibration_trains_the_averaged_head_on_draws_from_the_moments(per_class: bool) -> None:
    layers, y = heads(4, 4), torch.arange(60) % 3
    x = draw(60, 4) + 2 * nn.functional.one_hot(y, 4)
    moments = class_moments(x, y, 3, per_class=per_class)
    settings = Head(kind="calibrated", per_class=per_class, num_draws=50, num_epochs=2, learning_rate=0.05)
    made = settings.make(layers, moments, job())

    wanted = average_head(layers)
    features, labels = gaussian_draws(moments, 50, job().rng.torch("virtual features"))
    assert features.shape == (150, 4)
    sgd = LocalSGD(num_epochs=2, learning_rate=0.05, batch_size=128)
    train(wanted, Examples(features, labels), sgd, rng=job().rng.child("calibration"), device=torch.device("cpu"))
    assert torch.equal(made.weight, wanted.weight)
    assert torch.equal(made.bias, wanted.bias)
    before = (average_head(layers)(x).argmax(1) == y).double().mean()
    assert (made(x).argmax(1) == y).double().mean() > before


def test_calibration_on_joined_features_starts_from_the_mean_of_the_logits() -> None:
    layers = heads(2, 3)
    moments = class_moments(draw(30, 5), torch.arange(30) % 3, 3, per_class=True)
    settings = Head(kind="calibrated", features="concat", num_draws=10, num_epochs=1, learning_rate=1e-9)
    made = settings.make(layers, moments, job())
    torch.testing.assert_close(made.weight, joint_head(layers).weight, rtol=0, atol=1e-6)


def test_calibration_leaves_the_clients_heads_as_they_are() -> None:
    layers = heads(4, 4)
    before = [layer.weight.clone() for layer in layers]
    moments = class_moments(draw(30, 4), torch.arange(30) % 3, 3, per_class=True)
    Head(kind="calibrated", num_draws=10, num_epochs=1).make(layers, moments, job())
    assert all(torch.equal(a, layer.weight) for a, layer in zip(before, layers, strict=True))
