"""Mixtures of adapters by hand, and behind the blocks of many models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedfuse.core.artifact import Artifact, ModelSpec, detached_state
from fedfuse.core.errors import ConfigError, ModelError
from fedfuse.core.examples import Examples
from fedfuse.core.judging import Generates, HasObjective, JudgesItself
from fedfuse.models import spec
from fedfuse.models.foundation.dema import DenseMixture, MixtureShape, Tuned, is_shared
from fedfuse.models.foundation.placing import Plan, layers_of, spread
from fedfuse.training import evaluate

SMALL = {"vocab_size": 60, "intermediate_size": 24, "num_attention_heads": 2}
TRANSFORMERS = {
    "bert": {**SMALL, "hidden_size": 16, "num_hidden_layers": 3},
    "distilbert": {"vocab_size": 60, "dim": 12, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
    "llama": {**SMALL, "hidden_size": 16, "num_hidden_layers": 4},
    "gpt2": {"vocab_size": 60, "n_embd": 16, "n_layer": 3, "n_head": 2},
    "gpt_neox": {**SMALL, "hidden_size": 24, "num_hidden_layers": 2},
}
SHAPE = MixtureShape(num_positions=2, num_experts=3, rank=4, seed=7)


def text_model(kind: str, **settings: Any) -> ModelSpec:
    config = {"model_type": kind, **TRANSFORMERS[kind]}
    return spec("transformers", {"config": config, **settings}, input_shape=(8,), num_classes=3, seed=1)


def texts(n: int = 4) -> torch.Tensor:
    ids = torch.randint(0, 60, (n, 4), generator=torch.Generator().manual_seed(0)).float()
    return torch.cat([ids, torch.ones(n, 4)], 1)


def wake(net: Tuned) -> None:
    """Give the ways up random weights, so that the mixtures add something."""
    for name, parameter in net.named_parameters():
        if name.endswith(".up"):
            nn.init.normal_(parameter)


def test_a_mixture_by_hand() -> None:
    mixture = DenseMixture(2, [torch.eye(1), 3 * torch.eye(1)])
    with torch.no_grad():
        mixture.down.copy_(torch.tensor([[1.0], [0.0]]))
        mixture.up.copy_(torch.tensor([[0.0, 10.0]]))
        mixture.shares.copy_(torch.tensor([1.0, 3.0]).log())
    # Shares 1/4 and 3/4: 1/4 + 9/4 = 5/2; gelu(2 * 5/2) = gelu(5), times 10, on the second number.
    found = mixture(torch.tensor([[2.0, 1.0]]))
    assert found.tolist()[0] == pytest.approx([2.0, 1.0 + 10 * F.gelu(torch.tensor(5.0)).item()])


@pytest.mark.parametrize("shape", [(3, 5), (3, 7, 5), (3, 5, 2, 2)])
def test_at_first_nothing_is_added(shape: tuple[int, ...]) -> None:
    mixture = DenseMixture(5, list(torch.eye(2).repeat(3, 1, 1)))
    h = torch.randn(shape)
    assert torch.equal(mixture(h), h)
    with torch.no_grad():
        mixture.up.fill_(1.0)
    assert mixture(h).shape == h.shape
    assert not torch.equal(mixture(h), h)


def test_the_first_experts_are_the_same_whatever_the_model() -> None:
    first = SHAPE.first_shared()
    assert sorted(first) == [
        *[f"mixtures.{p}.{name}" for p in range(2) for name in ("experts.0", "experts.1", "experts.2", "shares")]
    ]
    for model in (
        text_model("bert"),
        spec("cnn", {"width": 4, "depth": 2}, input_shape=(1, 8, 8), num_classes=3, seed=1),
    ):
        shared = Plan(model, SHAPE).build().shared()
        assert sorted(shared) == sorted(first)
        assert all(torch.equal(shared[name], first[name]) for name in first)
    assert all(is_shared(name) for name in first)


@pytest.mark.parametrize("kind", sorted(TRANSFORMERS))
def test_mixtures_stand_behind_the_blocks_of_any_transformer(kind: str) -> None:
    pytest.importorskip("transformers")
    model = text_model(kind, peft={"kind": "head"})
    plan = Plan(model, SHAPE)
    num_layers = next(v for k, v in TRANSFORMERS[kind].items() if k in ("num_hidden_layers", "n_layers", "n_layer"))
    width = next(v for k, v in TRANSFORMERS[kind].items() if k in ("hidden_size", "dim", "n_embd"))
    assert [int(place.name.rpartition(".")[2]) for place in plan.places] == spread(num_layers, 2)
    assert {place.channels for place in plan.places} == {width}
    net, x = plan.build().eval(), texts()
    assert torch.allclose(net(x), model.build().eval()(x), atol=1e-6)
    wake(net)
    moved = net(x)
    assert not torch.allclose(moved, model.build().eval()(x), atol=1e-3)
    assert torch.allclose(Artifact(plan.recipe, detached_state(net)).module()(x), moved, atol=1e-6)
    # The hooks of a copy know the copied mixtures.
    other = copy.deepcopy(net)
    wake(net)
    assert torch.allclose(other(x), moved, atol=1e-6)
    # The head and the own projections: nothing of the base.
    assert sum(t.numel() for t in net.own().values()) == 3 * width + 3 + 2 * 2 * 4 * width


def test_a_language_model_keeps_its_objective_and_its_judgement() -> None:
    model = text_model("llama", task="causal_lm", peft={"kind": "lora", "rank": 2}, tokenizer="bytes")
    net, x = Plan(model, SHAPE).build().eval(), texts()
    assert isinstance(net, HasObjective)
    assert isinstance(net, JudgesItself)
    assert isinstance(net, Generates)
    y = torch.zeros(4, dtype=torch.int64)
    plain = model.build().eval()
    assert isinstance(plain, HasObjective)
    assert net.objective(x, y).item() == pytest.approx(plain.objective(x, y).item(), rel=1e-5)
    assert evaluate(net, Examples(x, y)).loss == pytest.approx(evaluate(plain, Examples(x, y)).loss, rel=1e-5)
    assert net.tokenizer == "bytes"
    assert net.num_generated == 0
    assert len(net.generate([[1, 2]], 3)) == 1
    assert not isinstance(Plan(text_model("llama"), SHAPE).build(), HasObjective)


@pytest.mark.parametrize(
    ("family", "settings", "channels"),
    [
        ("mlp", {"width": 6, "depth": 3}, [6, 6]),
        ("cnn", {"width": 4, "depth": 4}, [8, 8]),
        ("resnet", {"width": 2, "depth": 18}, [16, 16]),
        ("vit", {"width": 8, "depth": 2, "heads": 2}, [8, 8]),
    ],
)
def test_other_models_are_cut_into_blocks(family: str, settings: dict[str, Any], channels: list[int]) -> None:
    model = spec(family, settings, input_shape=(1, 8, 8), num_classes=3, seed=1)
    plan = Plan(model, SHAPE)
    assert [place.channels for place in plan.places] == channels
    net, x = plan.build().eval(), torch.rand(4, 1, 8, 8)
    assert torch.allclose(net(x), model.build().eval()(x), atol=1e-6)
    wake(net)
    assert torch.allclose(Artifact(plan.recipe, detached_state(net)).module()(x), net(x), atol=1e-6)


def test_positions_are_at_equal_relative_depths() -> None:
    assert [spread(n, 3) for n in (3, 6, 12)] == [[0, 1, 2], [1, 3, 5], [3, 7, 11]]
    assert all(spread(n, p)[-1] == n - 1 for n in range(1, 9) for p in range(1, n + 1))
    assert all(len(set(spread(n, p))) == p for n in range(1, 9) for p in range(1, n + 1))


def test_too_many_positions_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        _ = Plan(text_model("bert"), MixtureShape(4, 1, 2, 0)).places
    assert str(caught.value) == (
        "a model with 3 layers has no 4 places for mixtures\n  where: method.num_positions\n  fix:   give 3 or less"
    )
    small = spec("mlp", {"width": 4, "depth": 1}, input_shape=(4,), num_classes=2, seed=1)
    with pytest.raises(ConfigError) as caught:
        _ = Plan(small, MixtureShape(2, 1, 2, 0)).places
    assert str(caught.value) == (
        "the model cannot be cut into 2 blocks, at most into 1\n"
        "  where: method.num_positions\n"
        "  fix:   give fewer, or use another model"
    )
    with pytest.raises(ModelError, match="no list of layers of one kind"):
        layers_of(nn.Linear(2, 2))
