"""``fedfuse export``: a fused model in formats that other software runs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fedfuse.core.artifact import Artifact, detached_state
from fedfuse.core.errors import ArtifactError, did_you_mean
from fedfuse.core.files import write_atomically
from fedfuse.core.payload import Payload

_FOLDERS = ("diffusers", "peft", "transformers")


def export(path: Path, format_: str, out: Path | None = None) -> Path:
    """Write a fused model in another format and check that it gives the same numbers.

    Args:
        path: an artifact's or a run's folder.
        format_: ``onnx``, ``safetensors`` or ``torch-export``; of a foundation model ``peft``, a folder with its
            adapter, or ``transformers`` or ``diffusers``, a folder with the whole model.
        out: the file or folder to write; beside the artifact if left out.

    Returns:
        The file or folder.

    Raises:
        ArtifactError: the format is unknown, a part is not installed, or the exported model disagrees.
    """
    writers: dict[str, tuple[str, Callable[[nn.Module, Tensor, Path], None]]] = {
        "onnx": ("model.onnx", _to_onnx),
        "safetensors": ("weights.safetensors", _to_safetensors),
        "torch-export": ("model.pt2", _to_torch_export),
    }
    if format_ not in (*writers, *_FOLDERS):
        known = [*writers, *_FOLDERS]
        raise ArtifactError(f'there is no format "{format_}"', where="--format", fix=did_you_mean(format_, known))
    folder = path if (path / "fused.json").exists() else path / "artifact"
    artifact = Artifact.read(folder)
    if format_ in _FOLDERS:
        return _to_folder(artifact.module(), format_, out or folder / format_)
    shape = artifact.info.get("input_shape")
    if not shape:
        raise ArtifactError(
            "the artifact does not say which inputs it takes", where=str(folder), fix="export an artifact of a run"
        )
    name, write = writers[format_]
    file = out or folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    example = torch.rand((2, *shape), generator=torch.Generator().manual_seed(0))
    write(artifact.module(), example, file)
    return file


def _to_folder(module: nn.Module, format_: str, folder: Path) -> Path:
    from fedfuse.models.foundation.saving import save_adapter, save_pictures, save_whole

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError("there is something already", where=str(folder), fix="name a new folder with --out")
    writers = {"peft": save_adapter, "transformers": save_whole, "diffusers": save_pictures}
    writers[format_](module, folder)
    return folder


def _to_safetensors(module: nn.Module, example: Tensor, file: Path) -> None:
    write_atomically(file, Payload(dict(detached_state(module))).encode())


def _to_torch_export(module: nn.Module, example: Tensor, file: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
    torch.export.save(program, file)
    loaded = torch.export.load(file).module()
    _check(loaded(example), module(example), file)


def _to_onnx(module: nn.Module, example: Tensor, file: Path) -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ArtifactError(
            f"ONNX is not installed: {error}", where="--format onnx", fix='pip install "fedfuse[onnx]"'
        ) from None
    # The exporter tells of every operator of torchvision that is not there.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (example,),
            file,
            input_names=["input"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    _check(torch.from_numpy(session.run(None, {"input": example.numpy()})[0]), module(example), file)


def _check(found: Tensor, wanted: Tensor, file: Path) -> None:
    if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-4):
        worst = (found - wanted).abs().max().item()
        file.unlink()
        raise ArtifactError(
            f"the exported model differs by {worst:.2g}", where=str(file), fix="export as torch-export or safetensors"
        )
