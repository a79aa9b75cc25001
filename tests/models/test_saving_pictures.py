"""Text-to-image models in files that diffusers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import PIXELS, TRANSFORMED, WIDTH

from fedfuse.core.artifact import ModelSpec, detached_state
from fedfuse.core.errors import ArtifactError
from fedfuse.fusing.adapter import Adapter
from fedfuse.models import spec
from fedfuse.models.foundation import Foundation
from fedfuse.models.foundation.saving import save_adapter, save_pictures, save_whole

diffusers: Any = pytest.importorskip("diffusers")
MIXIN: Any = diffusers.loaders.StableDiffusionLoraLoaderMixin


def made(kind: str) -> ModelSpec:
    facts: dict[str, Any] = {"input_shape": (WIDTH,), "num_classes": 2, "seed": 3}
    return spec("diffusers", {"config": PIXELS, "peft": {"kind": kind, "rank": 2, "lora_alpha": 3.0}}, **facts)


def trained(model: ModelSpec) -> Foundation:
    """A model whose every trained number differs from the first one."""
    module, draw = model.build(), torch.Generator().manual_seed(5)
    assert isinstance(module, Foundation)
    moved = {k: t + 0.3 * torch.randn(t.shape, generator=draw) for k, t in detached_state(module).items()}
    module.load_state_dict(moved)
    return module


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_the_lora_file_makes_the_base_the_trained_model(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    module = trained(model)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    save_adapter(module, tmp_path / "lora")
    save_pictures(module, tmp_path / "whole")
    # B is zero in what nobody has trained.
    save_pictures(model.build(), tmp_path / "base")
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]
    base, whole = (diffusers.UNet2DConditionModel.from_pretrained(tmp_path / n / "unet") for n in ("base", "whole"))
    first = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    state, alphas, settings = MIXIN.lora_state_dict(str(tmp_path / "lora"), return_lora_metadata=True)
    MIXIN.load_lora_into_unet(state, network_alphas=alphas, unet=base, metadata=settings)
    base.fuse_lora()
    base.unload_lora()
    wanted = whole.state_dict()
    changed = set()
    for name, tensor in base.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5)
        if not torch.equal(tensor, first[name]):
            changed.add(name)
    # It is an adapter that can be fused, of the weights that changed.
    adapter = Adapter(tmp_path / "lora")
    assert {f"{name.removeprefix('unet.')}.weight" for name in adapter.modules} == changed
    scale = 3.0 / (2**0.5 if kind == "rslora" else 2)
    name = next(iter(adapter.modules))
    stem = "net.base_model.model." + name.removeprefix("unet.")
    b, a = (before[f"{stem}.lora_{part}.default.weight"].double() for part in "BA")
    torch.testing.assert_close(adapter.factors(name).product(), scale * b @ a, rtol=1e-5, atol=1e-6)
    # Nothing of it has changed the module.
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        save_adapter(made("dora").build(), tmp_path / "dora")
    assert str(caught.value) == (
        "a LoRA file of diffusers holds LoRA, and the model was trained by dora\n"
        "  where: --format peft\n  fix:   use --format diffusers"
    )
    with pytest.raises(ArtifactError) as caught:
        save_whole(made("lora").build(), tmp_path / "whole")
    assert str(caught.value) == (
        "the model is none of transformers\n  where: --format\n  fix:   use --format diffusers or safetensors"
    )
    with pytest.raises(ArtifactError) as caught:
        save_pictures(torch.nn.Linear(1, 1), tmp_path / "pictures")
    assert str(caught.value) == ("the model is none of diffusers\n  where: --format\n  fix:   use --format safetensors")
    assert not list(tmp_path.iterdir())


def test_a_model_that_takes_no_lora_file_says_so_before_anything_is_written(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"input_shape": (WIDTH,), "num_classes": 2, "seed": 3}
    model = spec("diffusers", {"config": TRANSFORMED, "peft": {"kind": "lora", "rank": 2}}, **facts)
    with pytest.raises(ArtifactError) as caught:
        save_adapter(model.build(), tmp_path / "lora")
    assert str(caught.value) == (
        "diffusers loads no LoRA file into a PixArtTransformer2DModel\n"
        "  where: --format peft\n  fix:   use --format diffusers, which writes the whole pipeline"
    )
    assert not (tmp_path / "lora").exists()
