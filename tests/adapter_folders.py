"""Adapters and base models on disk, as PEFT and transformers would have written them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedfuse.core.errors import FedfuseError
from fedfuse.core.shards import INDEX
from fedfuse.fusing import fuse_adapters
from fedfuse.fusing.adapter_config import AdapterConfig

WIDTH = 12
STEM = "base_model.model.model.layers.{}.self_attn.{}"


def make(
    folder: Path,
    seed: int = 0,
    *,
    r: int = 2,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    layers: int = 2,
    dtype: torch.dtype = torch.float64,
    extra: Mapping[str, Tensor] | None = None,
    drop: str = "",
    **config: Any,
) -> Path:
    """An adapter's folder, as PEFT would have written it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for target in targets:
            stem = STEM.format(layer, target)
            tensors[f"{stem}.lora_A.weight"] = torch.randn(r, WIDTH, dtype=dtype, generator=generator)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(WIDTH, r, dtype=dtype, generator=generator)
    tensors |= dict(extra or {})
    tensors = {key: tensor for key, tensor in tensors.items() if not drop or drop not in key}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    table = {
        "peft_type": "LORA",
        "base_model_name_or_path": "tiny",
        "task_type": "CAUSAL_LM",
        "r": r,
        "lora_alpha": 2 * r,
        "target_modules": list(targets),
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(table), encoding="utf-8")
    return folder


def make_three(folder: Path) -> list[Path]:
    """Adapters that differ in rank, alpha, rsLoRA and targets."""
    return [
        make(folder / "a", 0),
        make(folder / "b", 1, r=3, lora_alpha=5, use_rslora=True),
        make(folder / "c", 2, r=1, targets=("q_proj", "k_proj"), lora_dropout=0.1),
    ]


WEIGHTS = [0.5, 0.3, 0.2]


def deltas(folder: Path) -> dict[str, Tensor]:
    """Every weight's change by the definition: scale times B times A."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = AdapterConfig.read(folder)
    found = {}
    for key, right in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            scale = config.scale_of(name.removeprefix("base_model.model."))
            left = tensors[f"{name}.lora_B.weight"].double()
            found[name] = scale * (left @ right.double())
    return found


def exact(folders: list[Path], weights: list[float]) -> dict[str, Tensor]:
    summed: dict[str, Tensor] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for name, delta in deltas(folder).items():
            summed[name] = summed.get(name, torch.zeros_like(delta)) + weight * delta
    return summed


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], atol: float = 1e-10) -> None:
    assert set(found) == set(wanted)
    for name, delta in wanted.items():
        torch.testing.assert_close(found[name], delta, rtol=0, atol=atol)


def save_base(folder: Path, shards: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    names = [f"model.layers.{n}.self_attn.{m}.weight" for n in range(2) for m in ("q_proj", "k_proj", "v_proj")]
    tensors = {name: torch.randn(WIDTH, WIDTH, generator=generator) for name in names}
    tensors |= {"model.norm.weight": torch.randn(WIDTH, generator=generator).bfloat16(), "steps": torch.tensor(7)}
    folder.mkdir()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        place = {
            name: f"model-{n % shards + 1:05}-of-{shards:05}.safetensors" for n, name in enumerate(sorted(tensors))
        }
        for file in set(place.values()):
            save_file({name: t for name, t in tensors.items() if place[name] == file}, folder / file)
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": place}))
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "notes.bin").write_text("no part of a model")
    return tensors


def load_all(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def refused(kind: type[FedfuseError], paths: list[Path], tmp_path: Path, **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        fuse_adapters(paths, out=tmp_path / "never", **settings)
    assert not (tmp_path / "never").exists()
    return str(caught.value)
