"""Thin layers: products, ranks, and what they cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fedfuse.core.artifact import Artifact, build, load_state
from fedfuse.core.errors import ModelError
from fedfuse.models import spec
from fedfuse.models.low_rank import Layer, Thin, largest_ranks, layers_of, product_energy, thinned
from fedfuse.training import predict

CNN = spec("cnn", {"width": 8, "depth": 4}, input_shape=(1, 8, 8), num_classes=3, seed=1)


def test_a_matrix_of_rank_one_is_found_again() -> None:
    layer = Layer((2, 3), has_bias=True)
    weight = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])
    first, second = layer.factors(weight, 1)
    assert first.shape == (1, 3)
    assert second.shape == (2, 1)
    assert torch.allclose(layer.product(first, second), weight, atol=1e-6)
    # 6 numbers against 2 + 3.
    assert layer.saving(1) == 1


@pytest.mark.parametrize(
    "settings", [{}, {"stride": 2, "padding": 1}, {"stride": (1, 2), "dilation": 2, "padding": (2, 1)}]
)
def test_a_vertical_and_a_horizontal_convolution_are_one_at_full_rank(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Conv2d(2, 4, 3, **settings)).double()
    weight, bias = (parameter.detach() for parameter in whole.parameters())
    layer = Layer(tuple(weight.shape), has_bias=True)
    assert layer.matrix_shape == (12, 6)
    thin = thinned(nn.Sequential(nn.Conv2d(2, 4, 3, **settings)), {"0": 6}).double()
    first, second = layer.factors(weight, 6)
    assert torch.allclose(layer.product(first, second), weight, atol=1e-12)
    thin.load_state_dict({"0.0.weight": first, "0.1.weight": second, "0.1.bias": bias})
    x = torch.randn(2, 2, 9, 8, dtype=torch.float64)
    assert torch.allclose(thin(x), whole(x), atol=1e-10)


def test_the_first_and_the_last_layer_stay_whole() -> None:
    assert list(layers_of(CNN.build())) == ["3", "7", "10"]
    assert largest_ranks(CNN, 10**9) == {}


def test_ranks_are_the_highest_that_the_budget_allows() -> None:
    whole = sum(p.numel() for p in CNN.build().parameters())
    counts = []
    for budget in (whole - 1, whole // 2, whole // 3):
        thin = Thin.of(CNN, budget)
        module = thin.thin_spec.build()
        counts.append(sum(p.numel() for p in module.parameters()))
        assert counts[-1] <= budget
    assert counts == sorted(counts, reverse=True)
    # One step more would be too much: all layers have the same 64ths of their full rank.
    ranks = Thin.of(CNN, whole // 2).ranks
    full = {name: min(layer.matrix_shape) for name, layer in layers_of(CNN.build()).items()}
    step = next(k for k in range(64, 0, -1) if all(ranks[n] == max(1, full[n] * k // 64) for n in ranks))
    more = {n: max(1, full[n] * (step + 1) // 64) for n in ranks}
    layers = layers_of(CNN.build())
    assert whole - sum(layers[n].saving(r) for n, r in more.items() if layers[n].saving(r) > 0) > whole // 2
    # Even rank 1 is too large.
    assert set(Thin.of(CNN, 1).ranks.values()) == {1}


def test_a_model_that_is_made_thin_and_multiplied_out_does_the_same() -> None:
    state = CNN.build().state_dict()
    thin = Thin.of(CNN, sum(p.numel() for p in CNN.build().parameters()) // 2)
    small = thin.factorised(state)
    again = {name: thin.composed(name, small).to(state[name].dtype) for name in state}
    one, other = thin.thin_spec.build(), CNN.build()
    load_state(one, small)
    load_state(other, again)
    x = torch.rand(4, 1, 8, 8)
    assert torch.allclose(predict(one, x), predict(other, x), atol=1e-5)
    # What has that rank already is left as it is.
    twice = thin.factorised(again)
    third = {name: thin.composed(name, twice) for name in state}
    assert all(torch.allclose(third[name].float(), again[name].float(), atol=1e-5) for name in state)


def test_an_artifact_of_a_thin_model_is_rebuilt_from_its_recipe() -> None:
    thin = Thin.of(CNN, 3000)
    artifact = Artifact.of(thin.thin_spec, thin.thin_spec.build().state_dict())
    assert artifact.recipe["kind"] == "low_rank"
    assert sorted(build(artifact.recipe).state_dict()) == sorted(artifact.state)
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(predict(artifact.module(), x), predict(thin.thin_spec.build(), x))


def test_the_energy_of_a_product_is_that_of_the_weight() -> None:
    thin = Thin.of(CNN, 3000)
    module = thin.thin_spec.build()
    state = module.state_dict()
    wanted = sum(float(thin.composed(f"{name}.weight", state).square().sum()) for name in thin.ranks)
    assert product_energy(module, thin.ranks).item() == pytest.approx(wanted, rel=1e-5)


def test_a_model_with_adapters_or_without_inner_layers_is_refused() -> None:
    class Adapted(nn.Linear):
        lora_A = None  # noqa: N815 # PEFT's name

    with pytest.raises(ModelError) as caught:
        layers_of(nn.Sequential(Adapted(2, 2)))
    assert str(caught.value) == (
        "this model trains low-rank changes of its weights, not the weights\n"
        "  where: model.peft\n"
        "  fix:   use kind: full, or a method for adapters"
    )
    flat = spec("mlp", {"width": 3, "depth": 1}, input_shape=(4,), num_classes=2, seed=0)
    with pytest.raises(ModelError, match="no layer between its first and its last"):
        largest_ranks(flat, 5)
