"""Exported models give the same numbers as the artifact."""

from __future__ import annotations

import builtins
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fedfuse
from fedfuse.commands import exporting
from fedfuse.commands.exporting import export
from fedfuse.core.artifact import Artifact, detached_state, load_state
from fedfuse.core.errors import ArtifactError
from fedfuse.core.payload import Payload
from fedfuse.models import spec


@pytest.fixture
def artifact(run_folder: Path, tmp_path: Path) -> Path:
    """The artifact of a run of FuseFL, in a folder of the test's own."""
    return Path(shutil.copytree(run_folder / "artifact", tmp_path / "artifact"))


@torch.no_grad()
def outputs(folder: Path, num_examples: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(num_examples, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    return x, fedfuse.load(folder)(x)


def test_safetensors_hold_the_state_of_the_whole_module(artifact: Path, tmp_path: Path) -> None:
    file = export(artifact, "safetensors")
    assert file == artifact / "weights.safetensors"
    state = Payload.decode(file.read_bytes()).group("") or dict(Payload.decode(file.read_bytes()))
    module = Artifact.read(artifact).module()
    for p in module.parameters():
        torch.nn.init.zeros_(p)
    load_state(module, {name: t for name, t in state.items() if isinstance(t, Tensor)})
    x, wanted = outputs(artifact, 4)
    with torch.no_grad():
        assert torch.equal(module(x), wanted)


@pytest.mark.parametrize("num_examples", [1, 5])
def test_torch_export_takes_any_number_of_examples(artifact: Path, tmp_path: Path, num_examples: int) -> None:
    file = export(artifact, "torch-export", tmp_path / "elsewhere" / "net.pt2")
    assert file == tmp_path / "elsewhere" / "net.pt2"
    x, wanted = outputs(artifact, num_examples)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(file).module()(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fusefl", "ensemble", "fedavg", "feature_ensemble"])
def test_onnx_gives_the_same_numbers(method: str, commands_config: dict[str, Any], tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    local = commands_config["method"]["local"]
    section = {"name": method, "local": local, **({"num_blocks": 2} if method == "fusefl" else {})}
    fedfuse.run({**commands_config, "method": section}, out=tmp_path / "run")
    file = export(tmp_path / "run", "onnx")
    assert file == tmp_path / "run" / "artifact" / "model.onnx"
    assert sorted(path.name for path in file.parent.iterdir()) == ["fused.json", "model.onnx", "model.safetensors"]
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for num_examples in (1, 7):
        x, wanted = outputs(tmp_path / "run", num_examples)
        (found,) = session.run(["logits"], {"input": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-3, atol=1e-4)


def refused(path: Path, format_: str) -> str:
    with pytest.raises(ArtifactError) as caught:
        export(path, format_)
    return str(caught.value)


def test_an_unknown_format(artifact: Path) -> None:
    assert refused(artifact, "onx") == (
        'there is no format "onx"\n'
        "  where: --format\n"
        '  fix:   did you mean "onnx"? known: diffusers, onnx, peft, safetensors, torch-export, transformers'
    )


def test_a_folder_without_an_artifact(tmp_path: Path) -> None:
    said = refused(tmp_path, "safetensors")
    assert said.startswith("this is no artifact: ")
    assert said.endswith("  fix:   name a folder that holds fused.json and model.safetensors")


def test_an_artifact_that_does_not_say_its_inputs(tmp_path: Path) -> None:
    whole = spec("mlp", {"width": 4, "depth": 1}, input_shape=(3,), num_classes=2, seed=0)
    Artifact.of(whole, detached_state(whole.build())).save(tmp_path)
    assert refused(tmp_path, "safetensors") == (
        f"the artifact does not say which inputs it takes\n  where: {tmp_path}\n  fix:   export an artifact of a run"
    )


def test_onnx_that_is_not_installed(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *others: Any, **settings: Any) -> Any:
        if name == "onnx":
            raise ImportError("No module named 'onnx'")
        return original(name, *others, **settings)

    monkeypatch.setattr(builtins, "__import__", without)
    assert refused(artifact, "onnx") == (
        "ONNX is not installed: No module named 'onnx'\n  where: --format onnx\n  fix:   pip install \"fedfuse[onnx]\""
    )


def test_an_export_that_disagrees_is_not_left_behind(tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    file.write_bytes(b"x")
    exporting._check(torch.zeros(2), torch.tensor([0.0, 1e-5]), file)
    assert file.exists()
    with pytest.raises(ArtifactError) as caught:
        exporting._check(torch.zeros(2), torch.tensor([0.0, 0.5]), file)
    assert str(caught.value) == (
        f"the exported model differs by 0.5\n  where: {file}\n  fix:   export as torch-export or safetensors"
    )
    assert not file.exists()
