"""Adapters merged into their base model, and whole checkpoints fused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fedfuse
from adapter_folders import (
    WEIGHTS,
    WIDTH,
    deltas,
    exact,
    load_all,
    make,
    make_three,
    save_base,
)
from fedfuse.core.errors import FedfuseError
from fedfuse.core.shards import INDEX
from fedfuse.fusing import fuse_adapters


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Adapters that differ in rank, alpha, rsLoRA and targets."""
    return make_three(tmp_path)


@pytest.mark.parametrize("shards", [1, 3])
def test_merging_adds_the_exact_sum_to_the_base(three: list[Path], tmp_path: Path, shards: int) -> None:
    base = save_base(tmp_path / "base", shards)
    done = fuse_adapters(three, method="merge", weights=WEIGHTS, base=tmp_path / "base", out=tmp_path / "merged")
    found, wanted = load_all(done.folder), exact(three, WEIGHTS)
    assert set(found) == set(base)
    for name, tensor in base.items():
        change = wanted.get("base_model.model." + name.removesuffix(".weight"))
        torch.testing.assert_close(found[name], tensor if change is None else (tensor.double() + change).float())
    assert sorted(p.name for p in (tmp_path / "base").glob("*.safetensors")) == sorted(
        p.name for p in done.folder.glob("*.safetensors")
    )
    assert (done.folder / "config.json").exists()
    assert not (done.folder / "notes.bin").exists()
    assert not (done.folder / "adapter_config.json").exists()
    assert "library_name: transformers" in (done.folder / "README.md").read_text()


def test_fedex_merges_the_rest_and_keeps_a_small_adapter(three: list[Path], tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    done = fuse_adapters(three, method="fedex", residual="merged", base=tmp_path / "base", out=tmp_path / "fused")
    found, own, wanted = load_all(done.folder / "base"), deltas(done.folder), exact(three, [1 / 3] * 3)
    for name, change in wanted.items():
        key = name.removeprefix("base_model.model.") + ".weight"
        torch.testing.assert_close(found[key].double() + own[name], base[key].double() + change, rtol=0, atol=1e-5)
    assert max(done.ranks.values()) == 3
    table = json.loads((done.folder / "adapter_config.json").read_text())
    assert table["base_model_name_or_path"] == str(done.folder / "base")


def test_merging_heads_transposed_weights_and_models_saved_without_their_outer_name(tmp_path: Path) -> None:
    head = {"base_model.model.score.weight": torch.full((3, WIDTH), 2.0)}
    folder = make(
        tmp_path / "a", targets=("q_proj",), layers=1, extra=head, modules_to_save=["score"], fan_in_fan_out=True
    )
    weight = torch.randn(WIDTH, WIDTH)
    (tmp_path / "base").mkdir()
    save_file({"layers.0.self_attn.q_proj.weight": weight}, tmp_path / "base" / "model.safetensors")
    done = fuse_adapters([folder], method="merge", base=tmp_path / "base", out=tmp_path / "merged")
    found = load_all(done.folder)
    (change,) = deltas(folder).values()
    torch.testing.assert_close(found["layers.0.self_attn.q_proj.weight"], (weight.double() + change.T).float())
    assert found["score.weight"].eq(2.0).all()


# --- whole checkpoints


def test_sharded_checkpoints_are_fused_shard_by_shard(tmp_path: Path) -> None:
    base = save_base(tmp_path / "one", 2)
    save_base(tmp_path / "two", 3)
    for file in (tmp_path / "two").glob("*.safetensors"):
        save_file({name: tensor * 3 for name, tensor in load_file(file).items()}, file)
    out = fedfuse.fuse([tmp_path / "one", tmp_path / "two"], weights=[1, 3], out=tmp_path / "fused")
    found = load_all(out)
    for name, tensor in base.items():
        wanted = torch.tensor(18) if name == "steps" else (2.5 * tensor.double()).to(tensor.dtype)
        torch.testing.assert_close(found[name], wanted, rtol=1e-2 if tensor.dtype == torch.bfloat16 else 1e-6, atol=0)
        assert found[name].dtype == tensor.dtype
    assert (out / INDEX).read_bytes() == (tmp_path / "one" / INDEX).read_bytes()
    assert (out / "config.json").exists()
    ties = fedfuse.fuse(
        [tmp_path / "one", tmp_path / "two" / INDEX], method="ties", base=tmp_path / "one", out=tmp_path / "ties"
    )
    assert set(load_all(ties)) == set(base)


def test_indexes_that_are_broken(tmp_path: Path) -> None:
    save_base(tmp_path / "one", 2)
    index = tmp_path / "one" / INDEX
    whole = json.loads(index.read_text())
    for table, said in (
        ([], "the index is broken: TypeError"),
        ({"weight_map": []}, "the index is broken: it has no weight_map"),
        ({"weight_map": {"w": "../x.safetensors"}}, 'the file "../x.safetensors" of the index is not there'),
        ({"weight_map": {**whole["weight_map"], "w": "model-00001-of-00002.safetensors"}}, 'does not hold "w"'),
    ):
        index.write_text(json.dumps(table))
        with pytest.raises(FedfuseError) as caught:
            fedfuse.fuse([tmp_path / "one"] * 2, out=tmp_path / "never")
        assert said in str(caught.value)
        assert not (tmp_path / "never").exists()
