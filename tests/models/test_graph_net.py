"""A user's own module becomes a recipe that gives its names and numbers back, and no recipe can do harm."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.core.artifact import Artifact, build, detached_state, load_state
from fedfuse.core.errors import ArtifactError, FedfuseError, ModelError
from fedfuse.models import spec
from fedfuse.models.blocks import cut_spec
from fedfuse.models.graph import describe, user_spec
from fedfuse.models.layers import LAYERS, build_layer, describe_layer


class Functional(nn.Module):
    """Functions, methods, a reused activation, an unused layer, a mask that nobody gives."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding="same"), nn.GroupNorm(2, 8)
        self.relu, self.unused, self.head = nn.ReLU(), nn.Linear(2, 2), nn.Linear(128, 5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = F.max_pool2d(self.relu(self.norm1(self.conv1(x if mask is None else x * mask))), 2)
        x = self.relu(torch.relu(self.norm2(self.conv2(x))) + x)
        return self.head(x.view(x.size(0), -1))


class Bare(nn.Module):
    """Parameters, buffers and constants without a layer; infinity among them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 192))
        self.scales = nn.ParameterList([torch.randn(6), torch.randn(6)])
        self.register_buffer("shift", torch.randn(6))
        self.register_buffer("angles", torch.randn(6), persistent=False)
        self.constant = torch.tensor([float("inf"), 1.0, 2.0, 3.0, 4.0, 5.0])
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        y = F.linear(x.reshape(n, -1), self.weight) + self.scales[0] * self.shift
        y = torch.minimum(y * self.scales[1] + self.angles.cos(), self.constant)
        return self.head(y.clamp(min=-2.0)[:, :].to(dtype=torch.float32))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(192, 192)
        self.again = self.first
        self.other = nn.Linear(192, 192)
        self.other.weight = self.first.weight
        self.head = nn.Linear(192, 5)
        self.other.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.other(self.again(self.first(x.flatten(1)).tanh())))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1)
        self.cell = nn.LSTM(8, 4, batch_first=True, bidirectional=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.cell(self.mix(x.flatten(1, 2)))
        return self.head(hidden.mean(dim=1))


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(192, 8, dtype=torch.bfloat16), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.flatten(1).bfloat16()).float())


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)) if x.sum() > 0 else self.head(-x.flatten(1))


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(x.flatten(1), 0.5, self.training))


DESCRIBED: list[type[nn.Module]] = [Functional, Bare, Tied, Tokens]
SHAPE = (3, 8, 8)


@pytest.mark.parametrize("kind", DESCRIBED)
def test_a_described_module_has_the_users_names_and_numbers(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module = kind().eval()
    one = user_spec(module, input_shape=SHAPE, num_classes=5, seed=3)
    assert one.recipe["kind"] == "graph"
    assert one.template is None
    rebuilt = build(json.loads(json.dumps(one.recipe, sort_keys=True, allow_nan=False)))
    assert {n: t.shape for n, t in rebuilt.state_dict().items()} == {n: t.shape for n, t in module.state_dict().items()}
    load_state(rebuilt, module.state_dict())
    x = torch.randn(7, *SHAPE)
    assert torch.equal(rebuilt.eval()(x), module(x))
    assert torch.equal(one.build().eval()(x), module(x))


def test_types_of_numbers_are_kept() -> None:
    one = user_spec(Half(), input_shape=SHAPE, num_classes=5, seed=3)
    assert one.recipe["kind"] == "graph"
    assert one.build().state_dict()["body.weight"].dtype == torch.bfloat16


def test_what_was_tied_or_frozen_is_so_again() -> None:
    rebuilt = user_spec(Tied(), input_shape=SHAPE, num_classes=5, seed=3).build()
    assert rebuilt.get_submodule("again") is rebuilt.get_submodule("first")
    assert rebuilt.get_parameter("other.weight") is rebuilt.get_parameter("first.weight")
    assert [n for n, p in rebuilt.named_parameters() if not p.requires_grad] == ["other.bias"]


@pytest.mark.parametrize("family", ["mlp", "cnn", "resnet", "vit"])
def test_our_own_families_can_be_described(family: str) -> None:
    one = spec(family, {"width": 8}, input_shape=SHAPE, num_classes=5, seed=1)
    assert describe(one.build(), one.example_input(3)) is not None


def test_a_described_model_is_cut_like_any_other() -> None:
    one = user_spec(Functional(), input_shape=SHAPE, num_classes=5, seed=3)
    pieces = cut_spec(one, 2)
    assert [r["kind"] for r in pieces.recipes] == ["block", "block"]
    x = one.example_input(3)
    expected = one.build().eval()(x)
    for recipe, block in zip(pieces.recipes, pieces.blocks, strict=True):
        rebuilt = build(recipe).eval()
        load_state(rebuilt, block.state_dict())
        x = rebuilt(x)
    assert torch.equal(pieces.head(x), expected)


@pytest.mark.parametrize("kind", [Branching, Dropping])
def test_what_cannot_be_described_is_carried_itself(kind: type[nn.Module]) -> None:
    one = user_spec(kind(), input_shape=SHAPE, num_classes=5, seed=3)
    assert one.recipe == {"kind": "opaque", "name": kind.__name__}
    assert type(one.build()) is kind
    with pytest.raises(ArtifactError) as caught:
        build(one.recipe)
    assert str(caught.value) == (
        f"the model ({kind.__name__}) could not be described by a recipe, so its code is needed to load it\n"
        "  fix:   give a module of the same architecture: fedfuse.load(path, model=...)"
    )


def test_hooks_are_code() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    module[1].register_forward_hook(lambda *_: None)
    assert describe(module, torch.zeros(3, *SHAPE)) is None


def test_a_factory_draws_from_the_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = user_spec(Functional, input_shape=SHAPE, num_classes=5, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    two = user_spec(Functional, input_shape=SHAPE, num_classes=5, seed=3)
    three = user_spec(Functional, input_shape=SHAPE, num_classes=5, seed=4)
    assert one.digest == two.digest != three.digest


def test_a_module_is_copied_and_its_weights_are_the_first_weights() -> None:
    module = Functional()
    state = copy.deepcopy(module.state_dict())
    one = user_spec(module, input_shape=SHAPE, num_classes=5, seed=3)
    for parameter in one.build().parameters():
        parameter.data.zero_()
    built = one.build().state_dict()
    assert all(torch.equal(built[name], tensor) for name, tensor in state.items())
    assert module.training
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in state.items())


def test_lazy_layers_get_their_sizes() -> None:
    one = user_spec(lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(5)), input_shape=SHAPE, num_classes=5, seed=3)
    assert one.recipe["kind"] == "graph"
    assert one.initial["1.weight"].shape == (5, 192)


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (3, "the model is a int"),
        (lambda: 3, "the model's function gave a int"),
        (nn.Linear, None),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), "the model gives shape (3, 4) for 3 inputs, wanted (3, 5)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(7, 5)), None),
    ],
)
def test_what_is_no_model_for_the_data_is_said(model: Any, what: str | None) -> None:
    with pytest.raises(ModelError) as caught:
        user_spec(model, input_shape=SHAPE, num_classes=5, seed=3)
    assert what is None or caught.value.what == what
    assert caught.value.where == "model"
    assert caught.value.fix


def test_an_artifact_loads_in_a_process_without_the_users_code(tmp_path: Path) -> None:
    one = user_spec(Functional(), input_shape=SHAPE, num_classes=5, seed=3)
    Artifact.of(one, detached_state(one.build())).save(tmp_path / "artifact")
    program = (
        "import sys, torch; from fedfuse.core.artifact import load;"
        "print(load(sys.argv[1])(torch.ones(2, 3, 8, 8)).double().sum().item())"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "artifact")], capture_output=True, text=True, check=True
    )
    assert float(answer.stdout) == one.build().eval()(torch.ones(2, *SHAPE)).double().sum().item()


def _recipe(*steps: dict[str, Any], layers: Any = (), tensors: Any = ()) -> dict[str, Any]:
    entry = {"op": "input", "name": "x"}
    return {
        "kind": "graph", "layers": list(layers), "tensors": list(tensors), "ties": [], "frozen": [],
        "steps": [entry, *steps],
    }  # fmt: skip


def _call(op: str, target: Any, *args: Any, name: Any = "y") -> dict[str, Any]:
    return {"op": op, "name": name, "target": target, "args": [{"node": "x"}, *args]}


HOSTILE: dict[str, dict[str, Any]] = {
    "import": _recipe(_call("import", "os")),
    "function of the system": _recipe(_call("function", "os.system")),
    "loading": _recipe(_call("function", "torch.load")),
    "method": _recipe(_call("method", "__class__")),
    "data pointer": _recipe(_call("method", "data_ptr")),
    "code as a name": _recipe(_call("function", "torch.relu", name="y); import os; (")),
    "code as a path": _recipe(_call("layer", "a'); import os; ('")),
    "path to dunder by dots": _recipe(_call("tensor", "..__class__")),
    "unknown value": _recipe(_call("function", "torch.relu", {"import": "os"})),
    "value of two tags": _recipe(_call("function", "torch.relu", {"node": "x", "tuple": []})),
    "later step": _recipe(_call("function", "torch.add", {"node": "z"})),
    "dtype": _recipe(_call("function", "torch.relu", {"dtype": "load"})),
    "layer": _recipe(layers=[["a", {"layer": "Module", "settings": {}}]]),
    "layer by dots": _recipe(layers=[["a", {"layer": "utils.prune", "settings": {}}]]),
    "layer as list": _recipe(layers=[["a", {"layer": ["Linear"], "settings": {}}]]),
    "settings": _recipe(layers=[["a", {"layer": "Linear", "settings": {"in": 3}}]]),
    "name of a layer": _recipe(layers=[["forward", {"layer": "ReLU", "settings": {}}]]),
    "name of a tensor": _recipe(tensors=[["a;b", {"role": "buffer", "shape": [1], "dtype": "float32"}]]),
    "not a table": {"kind": "graph"},
}


@pytest.mark.parametrize("key", HOSTILE)
def test_a_recipe_that_was_changed_ends_in_one_error(key: str) -> None:
    with pytest.raises(FedfuseError):
        build(HOSTILE[key])


def test_an_attribute_that_recipes_may_not_read() -> None:
    step = {"op": "function", "name": "y", "target": "getattr", "args": [{"node": "x"}, "__class__"]}
    module = build(_recipe(step))
    with pytest.raises(ModelError, match='a recipe may not read the attribute "__class__"'):
        module(torch.zeros(1))


def test_a_function_without_a_name_is_named_in_the_error() -> None:
    with pytest.raises(ArtifactError) as caught:
        build(HOSTILE["function of the system"])
    assert str(caught.value) == (
        "the recipe asks for 'function' 'os.system', which recipes may not use\n"
        "  fix:   use an artifact that fedfuse wrote"
    )


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(3, 4, bias=False),
        nn.Conv2d(4, 8, (3, 1), stride=2, padding="valid", groups=2, padding_mode="zeros"),
        nn.ConvTranspose2d(4, 8, 3, output_padding=1, stride=2, bias=False),
        nn.BatchNorm2d(4, eps=1e-3, momentum=None, affine=False),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.GroupNorm(2, 4, affine=False),
        nn.LayerNorm((3, 4), bias=False),
        nn.LayerNorm(4, elementwise_affine=False),
        nn.PReLU(3),
        nn.Softmax(dim=1),
        nn.Dropout(0.3, inplace=True),
        nn.MaxPool2d(3, stride=1, padding=1, ceil_mode=True),
        nn.AdaptiveAvgPool2d((1, None)),
        nn.Unflatten(1, (2, 2)),
        nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=True),
        nn.Embedding(5, 3, padding_idx=0),
        nn.GRU(3, 4, num_layers=2, dropout=0.5, bias=False),
        nn.LSTM(3, 4, proj_size=2),
        nn.RNN(3, 4, nonlinearity="relu"),
        nn.MultiheadAttention(8, 2, bias=False, add_bias_kv=True, kdim=4, batch_first=True),
        nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", norm_first=True),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_settings_are_read_back_from_a_layer(layer: nn.Module) -> None:
    facts = describe_layer(layer)
    rebuilt = build_layer(json.loads(json.dumps(facts)))
    assert repr(rebuilt) == repr(layer)
    assert {n: t.shape for n, t in rebuilt.state_dict().items()} == {n: t.shape for n, t in layer.state_dict().items()}


def test_every_layer_of_the_list_exists_and_a_subclass_is_none_of_them() -> None:
    assert all(issubclass(getattr(nn, name), nn.Module) for name in LAYERS)

    class Linear(nn.Linear):
        pass

    assert describe_layer(Linear(2, 2)) is None
