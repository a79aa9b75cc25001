"""Fusing files that people already have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fedfuse
from fedfuse.core.artifact import Artifact, ModelSpec, detached_state
from fedfuse.core.errors import ArtifactError, ConfigError, FedfuseError
from fedfuse.core.payload import Payload
from fedfuse.models import spec


def model(width: int = 4, seed: int = 0) -> ModelSpec:
    settings = {"width": width, "depth": 2}
    return spec("cnn", settings, input_shape=(1, 8, 8), num_classes=3, seed=seed)


def saved(folder: Path, seed: int, width: int = 4) -> Artifact:
    whole = model(width, seed)
    artifact = Artifact.of(whole, detached_state(whole.build()))
    artifact.save(folder)
    return artifact


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    for seed in range(3):
        saved(tmp_path / f"a{seed}", seed)
    return [tmp_path / f"a{seed}" for seed in range(3)]


def states(folders: list[Path]) -> list[dict[str, Tensor]]:
    return [dict(Artifact.read(folder).state) for folder in folders]


def test_artifacts_are_averaged_into_an_artifact_that_works(three: list[Path], tmp_path: Path) -> None:
    out = fedfuse.fuse(three, out=tmp_path / "fused")
    assert out == tmp_path / "fused"
    found = Artifact.read(out)
    for name, tensor in found.state.items():
        wanted = torch.stack([s[name].double() for s in states(three)]).mean(0)
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-6, atol=1e-7)
        assert tensor.dtype == states(three)[0][name].dtype
    assert found.info == {"rule": "mean", "fused": [str(path) for path in three]}
    assert fedfuse.load(out)(torch.rand(2, 1, 8, 8)).shape == (2, 3)


def test_weights_are_taken_in_the_order_of_the_paths(three: list[Path], tmp_path: Path) -> None:
    fedfuse.fuse(three[:2], weights=[3, 1], out=tmp_path / "fused")
    first, second = states(three[:2])
    wanted = 0.75 * first["0.weight"] + 0.25 * second["0.weight"]
    torch.testing.assert_close(Artifact.read(tmp_path / "fused").state["0.weight"], wanted)


def test_equal_artifacts_give_that_artifact(three: list[Path], tmp_path: Path) -> None:
    fedfuse.fuse([three[0]] * 7, out=tmp_path / "fused")
    assert Artifact.read(tmp_path / "fused").digest() == Artifact.read(three[0]).digest()


@pytest.mark.parametrize(("method", "settings"), [("median", {}), ("trimmed_mean", {})])
def test_other_rules(three: list[Path], tmp_path: Path, method: str, settings: dict[str, Any]) -> None:
    fedfuse.fuse(three, method=method, out=tmp_path / "fused", **settings)
    wanted = torch.stack([s["0.weight"] for s in states(three)]).median(0).values
    if method == "median":
        torch.testing.assert_close(Artifact.read(tmp_path / "fused").state["0.weight"], wanted)
    assert Artifact.read(tmp_path / "fused").info["rule"] == method


def test_rules_that_fuse_differences_begin_from_a_base(three: list[Path], tmp_path: Path) -> None:
    base, one, two = states(three)
    out = fedfuse.fuse(three[1:], method="task_arithmetic", base=three[0], scaling=1.0, out=tmp_path / "fused")
    found = Artifact.read(out).state
    torch.testing.assert_close(found["0.weight"], one["0.weight"] + two["0.weight"] - base["0.weight"])
    for method in ("ties", "dare"):
        fused = fedfuse.fuse(three[1:], method=method, base=three[0] / "model.safetensors", out=tmp_path / method)
        # Running statistics are no weights: they are averaged.
        assert Artifact.read(fused).state["1.running_var"].equal((one["1.running_var"] + two["1.running_var"]) / 2)


@pytest.mark.parametrize("method", ["slerp", "karcher"])
def test_rules_of_whole_tensors(three: list[Path], tmp_path: Path, method: str) -> None:
    fused = fedfuse.fuse(three[:2], method=method, out=tmp_path / "fused")
    one, two = (state["0.weight"].flatten().double() for state in states(three[:2]))
    found = Artifact.read(fused).state["0.weight"].flatten().double()
    cosines = [float(found @ v / (found.norm() * v.norm())) for v in (one, two)]
    assert cosines[0] == pytest.approx(cosines[1], abs=0.05)
    assert float(found.norm()) > float(((one + two) / 2).norm())


def test_a_base_that_is_missing_or_not_looked_at(three: list[Path], tmp_path: Path) -> None:
    assert refused(ConfigError, three, tmp_path, method="ties") == (
        'the rule "ties" fuses differences from a base, and there is none\n  where: base\n'
        "  fix:   name the checkpoint that all began with"
    )
    assert refused(ConfigError, three, tmp_path, base=three[0]) == (
        'the rule "mean" does not look at a base\n  where: base\n  fix:   leave base out'
    )
    saved(tmp_path / "wide", 0, width=6)
    assert "the base has (6, 1, 3, 3)" in refused(FedfuseError, three, tmp_path, method="ties", base=tmp_path / "wide")


def test_checkpoints_without_a_recipe_give_a_checkpoint(tmp_path: Path) -> None:
    files = []
    for number in (1.0, 3.0):
        files.append(tmp_path / f"{number}.safetensors")
        files[-1].write_bytes(Payload({"w": torch.full((2, 2), number), "half": torch.ones(2).bfloat16()}).encode())
    out = fedfuse.fuse(files, out=tmp_path / "fused")
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    found = Payload.decode((out / "model.safetensors").read_bytes())
    assert found.tensor("w").tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert found.tensor("half").dtype == torch.bfloat16


def test_a_run_s_folder_is_found(three: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    saved(run / "artifact", 5)
    out = fedfuse.fuse([three[0], run], out=tmp_path / "fused")
    assert Artifact.read(out).recipe["kind"] == "model"


def refused(kind: type[FedfuseError], paths: list[Path], tmp_path: Path, **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        fedfuse.fuse(paths, out=tmp_path / "never", **settings)
    assert not (tmp_path / "never").exists()
    return str(caught.value)


def test_what_cannot_be_fused(three: list[Path], tmp_path: Path) -> None:
    saved(tmp_path / "wide", 0, width=6)
    both = [three[0], tmp_path / "wide"]
    assert refused(ArtifactError, both, tmp_path) == (
        f"the artifacts have different architectures\n  where: {both[0]}, {both[1]}\n"
        "  fix:   fuse artifacts of one architecture"
    )
    missing = tmp_path / "nothing"
    assert refused(ArtifactError, [three[0], missing], tmp_path) == (
        f"there are no weights\n  where: {missing}\n  fix:   name an artifact's folder or a .safetensors file"
    )
    assert refused(FedfuseError, three, tmp_path, method="men").startswith(
        'there is no rule "men"\n  fix:   did you mean "mean"? known: '
    )
    assert "unknown setting" in refused(FedfuseError, three, tmp_path, no_such=1)
    assert "2 weights for 3 uploads" in refused(FedfuseError, three, tmp_path, weights=[1, 2])
    assert "there is nothing to fuse" in refused(FedfuseError, [], tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 1}'])
def test_a_recipe_that_is_broken(three: list[Path], tmp_path: Path, content: str) -> None:
    (three[1] / "fused.json").write_text(content, encoding="utf-8")
    said = refused(ArtifactError, three, tmp_path)
    assert said.startswith("fused.json is broken: ")
    assert said.endswith(f"\n  where: {three[1]}\n  fix:   copy the artifact again")


def test_checkpoints_that_do_not_hold_the_same_tensors(tmp_path: Path) -> None:
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    files[0].write_bytes(Payload({"w": torch.zeros(2)}).encode())
    files[1].write_bytes(Payload({"w": torch.zeros(3)}).encode())
    assert '"w"' in refused(FedfuseError, files, tmp_path)
    files[1].write_bytes(Payload({"w": torch.zeros(2), "b": torch.zeros(1)}).encode())
    assert 'do not both hold "b"' in refused(FedfuseError, files, tmp_path)
    files[1].write_bytes(b"not a payload")
    assert "not a payload" in refused(FedfuseError, files, tmp_path)


def test_an_artifact_and_a_bare_checkpoint_do_not_mix(three: list[Path], tmp_path: Path) -> None:
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes((three[1] / "model.safetensors").read_bytes())
    assert "different architectures" in refused(ArtifactError, [three[0], bare], tmp_path)


def test_what_was_fused_is_written_down_as_json(three: list[Path], tmp_path: Path) -> None:
    fedfuse.fuse([str(path) for path in three], out=str(tmp_path / "fused"))
    facts = json.loads((tmp_path / "fused" / "fused.json").read_text())
    assert facts["info"]["fused"] == [str(path) for path in three]


def test_krum_gives_one_of_the_files_whole(three: list[Path], tmp_path: Path) -> None:
    fedfuse.fuse([*three, three[1]], method="krum", out=tmp_path / "fused")
    # Of four, each is judged by its nearest neighbour: the one that is there twice has one at no distance.
    found = Artifact.read(tmp_path / "fused").state
    assert all(tensor.equal(states(three)[1][name]) for name, tensor in found.items())
    fedfuse.fuse(three[:1], method="geometric_median", out=tmp_path / "one")
    assert all(t.equal(states(three)[0][name]) for name, t in Artifact.read(tmp_path / "one").state.items())
