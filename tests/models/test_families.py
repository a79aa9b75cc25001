"""Families build what their settings say, for every image they promise to take."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

from fedfuse.core.artifact import build, detached_state
from fedfuse.core.errors import ConfigError, ModelError, RegistryError
from fedfuse.core.registry import MODELS
from fedfuse.models import spec, with_width
from fedfuse.models.timm import Timm
from fedfuse.models.torchvision import TorchVision, built, import_optional


def _make(family: str, shape: tuple[int, ...], /, **settings: Any) -> nn.Module:
    return spec(family, settings, input_shape=shape, num_classes=5, seed=1).build()


def test_the_families_are_these() -> None:
    assert {"mlp", "cnn", "resnet", "vit", "timm", "torchvision"} <= set(MODELS.names())


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (1, 28, 28), (3, 64, 64)])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mlp", {"dropout": 0.5}),
        ("cnn", {"width": 4}),
        ("cnn", {"width": 4, "norm": "group"}),
        ("cnn", {"width": 4, "depth": 6, "norm": "none"}),
        ("resnet", {"width": 4}),
        ("resnet", {"width": 4, "depth": 50, "norm": "group"}),
        ("resnet", {"width": 4, "norm": "none", "stem": "imagenet"}),
        ("vit", {"width": 16, "depth": 2}),
        ("vit", {"width": 16, "depth": 2, "pool": "token", "dropout": 0.1}),
    ],
)
def test_every_family_gives_logits(name: str, settings: dict[str, Any], shape: tuple[int, ...]) -> None:
    module = _make(name, shape, **settings).eval()
    with torch.no_grad():
        assert module(torch.zeros(2, *shape)).shape == (2, 5)
    assert isinstance(list(module.children())[-1], nn.Linear)


def test_numbers_of_parameters_by_hand() -> None:
    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    # 64 inputs, hidden 16 and 16: 64*16+16 + 16*16+16 + 16*5+5
    assert count(_make("mlp", (1, 8, 8), width=16, depth=2)) == 1040 + 272 + 85
    # one 3x3 convolution 1 -> 4 without bias, BatchNorm 2*4, head 4*5+5
    assert count(_make("cnn", (1, 8, 8), width=4, depth=1)) == 36 + 8 + 25
    # patches 16*8+8, positions 4*8, class token 8, block: norms 2*16, attention 3*72+72, mlp 8*16+16+16*8+8,
    # last norm 16, head 8*5+5
    vit = _make("vit", (1, 8, 8), width=8, depth=1, heads=2, pool="token")
    assert count(vit) == 136 + 32 + 8 + 32 + 288 + 280 + 16 + 45


def test_the_resnets_have_their_depth() -> None:
    for depth, num_convolutions in ((18, 17), (34, 33), (50, 49)):
        module = _make("resnet", (3, 8, 8), width=2, depth=depth)
        # The 1x1 convolutions of shortcuts do not count.
        main = [n for n, m in module.named_modules() if isinstance(m, nn.Conv2d) and "shortcut" not in n]
        assert len(main) == num_convolutions


def test_the_seed_decides_the_weights_and_the_recipe_rebuilds_the_architecture() -> None:
    one = spec("vit", {"width": 16, "depth": 1}, input_shape=(3, 8, 8), num_classes=5, seed=1)
    state, again = detached_state(one.build()), detached_state(one.build())
    assert all(torch.equal(state[name], again[name]) for name in state)
    rebuilt = build(one.recipe).state_dict()
    assert [(n, t.shape) for n, t in rebuilt.items()] == [(n, t.shape) for n, t in state.items()]


def test_attention_is_the_plain_formula() -> None:
    module = _make("vit", (1, 8, 8), width=8, depth=1, heads=2)[1].attention  # type: ignore[index]
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    q, k, v = (module.inner(x)[..., i * 8 : (i + 1) * 8] for i in range(3))
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        scores = q[..., h] @ k[..., h].transpose(1, 2) / 4**0.5
        heads.append(scores.softmax(-1) @ v[..., h])
    torch.testing.assert_close(module(x), module.outer(torch.cat(heads, -1)))


def test_with_width_changes_nothing_else() -> None:
    one = spec("cnn", {"width": 8, "depth": 3}, input_shape=(1, 8, 8), num_classes=5, seed=1)
    wide = with_width(one, 4)
    assert wide.recipe["settings"] == {**one.recipe["settings"], "width": 4}
    assert (wide.seed, wide.input_shape, wide.num_classes) == (1, (1, 8, 8), 5)
    timm = spec("timm", {}, input_shape=(1, 8, 8), num_classes=5, seed=1)
    with pytest.raises(ModelError) as caught:
        with_width(timm, 4)
    assert str(caught.value) == (
        "the width of this model cannot be changed\n"
        "  where: method.width\n"
        "  fix:   use width: own, or a model family that has a width"
    )


@pytest.mark.parametrize(
    ("name", "shape", "settings", "kind", "message"),
    [
        ("cnn", (1, 8, 8), {"widht": 3}, ConfigError, 'unknown setting "widht"'),
        ("vit", (10,), {}, ModelError, "a vit takes images, not inputs of shape (10,)"),
        ("vit", (1, 8, 8), {"width": 10}, ConfigError, "4 heads cannot share a width of 10"),
        ("vit", (1, 28, 30), {}, ConfigError, "an image of 28 x 30 cannot be cut into patches of 4 x 4"),
        ("cnn", (10,), {}, ModelError, "a cnn takes images, not inputs of shape (10,)"),
        ("resnet", (10,), {}, ModelError, "a resnet takes images, not inputs of shape (10,)"),
        ("timm", (10,), {}, ModelError, "models of timm take images, not inputs of shape (10,)"),
        (
            "torchvision",
            (1, 8, 8),
            {},
            ModelError,
            "models of torchvision take colour images, not inputs of shape (1, 8, 8)",
        ),
    ],
)
def test_what_cannot_be_built_is_said(
    name: str, shape: tuple[int, ...], settings: dict[str, Any], kind: type[ConfigError], message: str
) -> None:
    with pytest.raises(kind) as caught:
        _make(name, shape, **settings)
    assert caught.value.what == message
    assert caught.value.fix


def test_an_unknown_setting_or_family_names_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        spec("vit", {"head": 3}, input_shape=(1, 8, 8), num_classes=5, seed=1)
    assert caught.value.fix.startswith('did you mean "heads"? known: depth, dropout, heads,')
    with pytest.raises(RegistryError, match='there is no model "resent"'):
        spec("resent", {}, input_shape=(1, 8, 8), num_classes=5, seed=1)


@pytest.mark.parametrize(
    ("error", "what", "fix"),
    [
        (ImportError("x"), "timm is not installed", "pip install timm, in the build that fits your torch"),
        (
            RuntimeError("operator torchvision::nms does not exist\nmore"),
            "timm cannot be imported: operator torchvision::nms does not exist",
            "install torch and torchvision of the same build (both for the CPU, or both for the same CUDA)",
        ),
    ],
)
def test_a_package_that_does_not_import_is_explained(
    monkeypatch: pytest.MonkeyPatch, error: Exception, what: str, fix: str
) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ModelError) as caught:
        Timm().build((3, 8, 8), 5)
    assert (caught.value.what, caught.value.fix) == (what, fix)


class _Package:
    """Stands for timm and torchvision.models where neither is installed."""

    def is_model(self, name: str) -> bool:
        return name == "small"

    def list_models(self, **_: Any) -> list[str]:
        return ["small", "large"]

    def create_model(
        self, name: str, *, pretrained: bool, num_classes: int, in_chans: int, bias: bool = True
    ) -> nn.Module:
        assert not pretrained
        return nn.Sequential(nn.Flatten(), nn.Linear(in_chans * 64, num_classes, bias=bias))

    def get_model(self, name: str, *, weights: None, num_classes: int, bias: bool = True) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes, bias=bias))


@pytest.mark.parametrize("family", ["timm", "torchvision"])
def test_models_of_other_packages_by_name(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    package = _Package()
    monkeypatch.setattr(f"fedfuse.models.{family}.import_optional", lambda name: package)
    module = _make(family, (3, 8, 8), name="small", settings={"bias": False})
    assert module(torch.zeros(2, 3, 8, 8)).shape == (2, 5)
    assert module[1].bias is None  # type: ignore[index]
    with pytest.raises(ConfigError) as caught:
        _make(family, (3, 8, 8), name="smal")
    assert caught.value.what == f'{family} has no model "smal"'
    assert caught.value.fix.startswith('did you mean "small"?')
    with pytest.raises(ConfigError) as caught:
        _make(family, (3, 8, 8), name="small", settings={"depth": 3})
    assert caught.value.what.startswith('the model "small" cannot be built: ')
    assert caught.value.where == "model.settings"


def test_what_is_installed_is_imported() -> None:
    assert import_optional("torch.nn") is nn
    assert isinstance(built(lambda name, **_: nn.Identity(), "x"), nn.Identity)
    assert TorchVision().name == Timm().name == "resnet18"
