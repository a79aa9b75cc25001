"""LoRA files of diffusers pipelines: read, fused, grown, and loaded by diffusers again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fedfuse
from adapter_folders import make
from fedfuse.core.errors import ArtifactError, FedfuseError
from fedfuse.fusing import add_adapter, fuse_adapters
from fedfuse.fusing.adapter import Adapter

FILE = "pytorch_lora_weights.safetensors"
STEMS = ("unet.down.attn1.to_q", "unet.mid.attn1.to_k")
WIDTH = 8
STYLES = {
    "peft": (".lora_B.weight", ".lora_A.weight"),
    "old": (".lora.up.weight", ".lora.down.weight"),
    "kohya": (".lora_up.weight", ".lora_down.weight"),
}


def write(
    folder: Path,
    seed: int,
    rank: int = 2,
    *,
    style: str = "peft",
    alpha: float | None = None,
    settings: dict[str, Any] | None = None,
) -> Path:
    """A folder as a pipeline would have written it."""
    draw = torch.Generator().manual_seed(seed)
    left, right = STYLES[style]
    tensors = {}
    for stem in STEMS:
        tensors[stem + left] = torch.randn(WIDTH, rank, generator=draw)
        tensors[stem + right] = torch.randn(rank, WIDTH, generator=draw)
        if alpha is not None:
            tensors[stem + ".alpha"] = torch.tensor(alpha)
    folder.mkdir(parents=True)
    metadata = {"format": "pt"} | ({} if settings is None else {"lora_adapter_metadata": json.dumps(settings)})
    save_file(tensors, folder / FILE, metadata=metadata)
    return folder


def deltas(folder: Path, scale: float = 1.0, style: str = "peft") -> dict[str, Tensor]:
    tensors, (left, right) = load_file(folder / FILE), STYLES[style]
    return {stem: scale * tensors[stem + left].double() @ tensors[stem + right].double() for stem in STEMS}


@pytest.mark.parametrize("style", STYLES)
def test_the_exact_sum_in_the_names_of_the_files(style: str, tmp_path: Path) -> None:
    one, two = write(tmp_path / "a", 0, style=style, alpha=4.0), write(tmp_path / "b", 1, rank=3, style=style)
    done = fuse_adapters([one, two], weights=[3, 1], out=tmp_path / "fused")
    found = deltas(done.folder, style=style)
    first, second = deltas(one, 4.0 / 2, style), deltas(two, style=style)
    for stem, delta in found.items():
        torch.testing.assert_close(delta, 0.75 * first[stem] + 0.25 * second[stem], rtol=0, atol=1e-5)
    # Nothing but the file that diffusers reads, and what we say of it; no alpha, so that the scale is 1.
    assert sorted(path.name for path in done.folder.iterdir()) == ["README.md", "fusion.json", FILE]
    assert not [key for key in load_file(done.folder / FILE) if "alpha" in key]
    assert "library_name: diffusers" in (done.folder / "README.md").read_text()
    assert done.ranks == dict.fromkeys(STEMS, 5)


def test_the_settings_in_the_header_decide_the_scale(tmp_path: Path) -> None:
    settings = {"unet.r": 2, "unet.lora_alpha": 6, "unet.alpha_pattern": {"mid.attn1.to_k": 10}}
    ours = Adapter(write(tmp_path / "a", 0, settings=settings))
    assert [ours.config.scale_of(stem) for stem in STEMS] == [3.0, 5.0]
    stable = {"unet.r": 2, "unet.lora_alpha": 6, "unet.use_rslora": True}
    ours = Adapter(write(tmp_path / "b", 0, settings=stable))
    assert ours.config.scale_of(STEMS[0]) == pytest.approx(6 / 2**0.5)
    # Another network's settings are no business of this one's.
    ours = Adapter(write(tmp_path / "c", 0, settings={"text_encoder.r": 2, "text_encoder.lora_alpha": 9}))
    assert ours.config.scale_of(STEMS[0]) == 1.0


def test_every_door_takes_them(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a", 0), write(tmp_path / "b", 1)
    assert fedfuse.fuse([one, two], method="svd", rank=2, out=tmp_path / "fused") == tmp_path / "fused"
    add_adapter(tmp_path / "growing", two)
    add_adapter(tmp_path / "growing", one)
    fuse_adapters([one, two], out=tmp_path / "once", names=["a", "b"])
    assert (tmp_path / "growing" / FILE).read_bytes() == (tmp_path / "once" / FILE).read_bytes()
    from fedfuse.commands.fusing_files import describe_adapter

    assert "  targets     to_k, to_q (2 weights)\n" in describe_adapter(one)


def test_diffusers_loads_what_was_fused(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    utilities = pytest.importorskip("diffusers.utils.state_dict_utils")
    mixin = diffusers.loaders.StableDiffusionLoraLoaderMixin

    def network() -> Any:
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            sample_size=4,
            in_channels=1,
            out_channels=1,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            block_out_channels=(8,),
            layers_per_block=1,
            cross_attention_dim=8,
            attention_head_dim=2,
            norm_num_groups=2,
        ).eval()

    inputs = (torch.ones(1, 1, 4, 4), torch.tensor(3), torch.ones(1, 2, 8))
    folders, changes = [], []
    for seed, alpha in ((1, 2), (2, 6)):
        net = network()
        net.add_adapter(peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["to_q", "to_v"]))
        draw = torch.Generator().manual_seed(seed)
        for name, p in net.named_parameters():
            if "lora_" in name:
                p.data = torch.randn(p.shape, generator=draw)
        layers = utilities.convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(net))
        settings = {"r": 2, "lora_alpha": alpha, "target_modules": ["to_q", "to_v"]}
        mixin.save_lora_weights(tmp_path / f"lora_{seed}", unet_lora_layers=layers, unet_lora_adapter_metadata=settings)
        folders.append(tmp_path / f"lora_{seed}")
        net.fuse_lora()
        changes.append({n.replace(".base_layer", ""): p for n, p in net.state_dict().items() if "lora_" not in n})
    fused = fuse_adapters(folders, weights=[0.25, 0.75], out=tmp_path / "fused").folder
    state, alphas, settings = mixin.lora_state_dict(str(fused), return_lora_metadata=True)
    net = network()
    mixin.load_lora_into_unet(state, network_alphas=alphas, unet=net, metadata=settings)
    wanted = network()
    wanted.load_state_dict({name: 0.25 * t + 0.75 * changes[1][name] for name, t in changes[0].items()})
    with torch.inference_mode():
        plain, found, mean = (n(*inputs).sample for n in (network(), net, wanted))
    assert float((mean - plain).abs().max()) > 0.01
    torch.testing.assert_close(found, mean, rtol=1e-4, atol=1e-5)


# --- what is refused


def refused(*paths: Path, kind: type[FedfuseError] = ArtifactError, out: Path) -> str:
    with pytest.raises(kind) as caught:
        fuse_adapters(paths, out=out / "never")
    assert not (out / "never").exists()
    return str(caught.value)


def test_what_does_not_mix_and_what_is_broken(tmp_path: Path) -> None:
    one = write(tmp_path / "a", 0)
    assert refused(one, make(tmp_path / "peft"), out=tmp_path) == (
        f"adapters of PEFT and LoRA files of diffusers do not mix\n  where: {tmp_path / 'peft'}\n"
        "  fix:   save all by load_lora_weights and save_lora_weights of the pipeline"
    )
    dora = write(tmp_path / "dora", 0, settings={"unet.r": 2, "unet.lora_alpha": 2, "unet.use_dora": True})
    assert refused(one, dora, out=tmp_path) == (
        f"the file holds DoRA, whose changes have no sum\n  where: {dora / FILE}\n  fix:   merge it into its base"
    )
    odd = write(tmp_path / "odd", 0)
    save_file(load_file(odd / FILE), odd / FILE, metadata={"lora_adapter_metadata": "["})
    assert refused(odd, out=tmp_path).startswith("the settings in the file's header are broken: ")
    half = write(tmp_path / "half", 0)
    save_file({k: t for k, t in load_file(half / FILE).items() if not k.endswith("to_q.lora_B.weight")}, half / FILE)
    assert refused(half, out=tmp_path) == (
        f'the adapter has "{STEMS[0]}.lora_A.weight" without its B\n  where: {half}\n'
        "  fix:   the file is not whole: copy it again"
    )
