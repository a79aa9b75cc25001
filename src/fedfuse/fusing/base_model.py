"""Changes added to a base model's weights, written as a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedfuse.core.errors import ArtifactError, ModelError
from fedfuse.core.files import write_atomically
from fedfuse.core.payload import PayloadFile
from fedfuse.core.shards import INDEX, Shards
from fedfuse.core.streaming import TensorWriter
from fedfuse.fusing.adapter import Place
from fedfuse.ops.lora import Factors, is_finite
from fedfuse.rules.reading import Upload

WEIGHTS = "model.safetensors"

# Files that lie beside weights and are needed to load or use them.
_BESIDE = {".json", ".txt", ".model", ".jinja"}
_CHUNK_BYTES = 64 << 20


def open_weights(path: Path, names: Iterable[str] = (WEIGHTS,)) -> PayloadFile | Shards:
    """Open a checkpoint, in one file or several.

    Args:
        path: the file itself, its index, or the folder of either.
        names: of files to look for in a folder, the first that is there counts.

    Returns:
        Its tensors, read when they are asked for.

    Raises:
        ArtifactError: there is no checkpoint.
    """
    candidates = [path] if path.is_file() else [path / name for name in (*names, INDEX)]
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        raise ArtifactError(
            "there are no weights", where=str(path), fix="name an artifact's folder or a .safetensors file"
        )
    return Shards(found) if found.suffix == ".json" else PayloadFile(found)


def copy_beside(source: Path, target: Path) -> None:
    """Copy a model's configuration and tokenizer.

    Args:
        source: the model's folder.
        target: another folder; files that are there stay.
    """
    for path in sorted(source.iterdir()):
        is_ours = path.name in {INDEX, "adapter_config.json", "fused.json", "fusion.json"}
        if path.is_file() and path.suffix in _BESIDE and not is_ours and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


class BaseModel:
    """A base model's weights on disk.

    Args:
        path: its folder, its index or its one file.
        is_transposed: whether weights are stored as ``(d_in, d_out)``: ``fan_in_fan_out`` of PEFT.
    """

    def __init__(self, path: Path, *, is_transposed: bool = False) -> None:
        self.path = path
        self.weights = open_weights(path)
        self.is_transposed = is_transposed
        self._upload = Upload(self.weights)
        self._keys = set(self.weights)

    def key_of(self, module: str, part: str = "weight") -> str:
        """The key of a module's tensor; a model inside of another may have been saved without the outer one's name.

        Args:
            module: its name in the model that was trained.
            part: ``weight`` or ``bias``.

        Returns:
            The key.

        Raises:
            ModelError: there is none.
        """
        rest = module
        while rest:
            if f"{rest}.{part}" in self._keys:
                return f"{rest}.{part}"
            rest = rest.partition(".")[2]
        raise ModelError(
            f'the base model has no {part} of "{module}"',
            where=str(self.path),
            fix="name the base model that the adapters were trained on",
        )

    def check_fits(self, module: str, place: Place) -> None:
        """Refuse changes of another model's weights.

        Args:
            module: its name.
            place: what its change looks like.

        Raises:
            ModelError: the base's weight has another shape.
        """
        looks = self._upload.looks(self.key_of(module))
        shape = () if looks is None else looks[0]
        flat = (shape[0], torch.Size(shape[1:]).numel()) if shape else ()
        wanted = place.shape[::-1] if place.is_embedding or self.is_transposed else place.shape
        if flat != wanted:
            raise ModelError(
                f'the base model has {shape} as "{module}", the adapters change {wanted}',
                where=str(self.path),
                fix="name the base model that the adapters were trained on",
            )

    def write(
        self,
        folder: Path,
        modules: Mapping[str, Place],
        change: Callable[[str], Factors],
        others: Mapping[str, Tensor],
    ) -> None:
        """Write the model with its changes, tensor by tensor, in as many files as it has.

        Args:
            folder: made if it is not there.
            modules: whose weights are changed.
            change: gives the change of one of them.
            others: tensors that take the place of the base's, or are added; by their keys.
        """
        changed = {self.key_of(module): module for module in modules}
        files = self.weights.files if isinstance(self.weights, Shards) else {WEIGHTS: self.weights}
        held = {name: [key for key in file if key in self._keys] for name, file in files.items()}
        added = sorted(set(others) - self._keys)
        last = max(held)
        for name, keys in held.items():
            wanted = keys + (added if name == last else [])
            with TensorWriter(folder / name, wanted) as writer:
                for key in sorted(wanted, key=lambda k: (-self._item_bytes(k, others), k)):
                    module = changed.get(key)
                    if key in others:
                        writer.put(key, others[key])
                    else:
                        tensor = self._read(key)
                        if module is not None:
                            self._add(tensor, change(module), is_embedding=modules[module].is_embedding, name=module)
                        writer.put(key, tensor)
        if isinstance(self.weights, Shards):
            index = json.loads(self.weights.path.read_text(encoding="utf-8"))
            index["weight_map"] |= dict.fromkeys(added, last)
            write_atomically(folder / INDEX, json.dumps(index, indent=2, sort_keys=True).encode())
        if self.path.is_dir():
            copy_beside(self.path, folder)

    def bias(self, module: str, plus: Tensor) -> tuple[str, Tensor]:
        """A module's bias with something added to it.

        Args:
            module: its name.
            plus: what is added.

        Returns:
            Its key and the sum.
        """
        key = self.key_of(module, "bias")
        tensor = self._read(key)
        return key, (tensor.double() + plus).to(tensor.dtype)

    def key_like(self, key: str) -> str:
        """A tensor's key in the base, where it is called by a longer name.

        Args:
            key: in the model that was trained.

        Returns:
            The base's own key, or the same one where the base has none.
        """
        module, _, part = key.rpartition(".")
        try:
            return self.key_of(module, part)
        except ModelError:
            return key

    def _item_bytes(self, key: str, others: Mapping[str, Tensor]) -> int:
        if key in others:
            return int(others[key].element_size())
        looks = self._upload.looks(key)
        return 0 if looks is None else looks[1].itemsize

    def _read(self, key: str) -> Tensor:
        looks = self._upload.looks(key)
        if looks is None:
            raise ModelError(f'"{key}" is no tensor', where=str(self.path))
        shape, dtype = looks
        return self._upload.read(key, 0, torch.empty(torch.Size(shape).numel(), dtype=dtype)).view(shape)

    def _add(self, weight: Tensor, change: Factors, *, is_embedding: bool, name: str) -> None:
        """Add a change in place, some rows at a time."""
        left, right = change.left, change.right
        if is_embedding or self.is_transposed:
            left, right = right.T, left.T
        rows = weight.view(len(weight), -1)
        step = max(1, _CHUNK_BYTES // (8 * rows.shape[1]))
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            part.copy_(part.double().addmm_(left[start : start + step], right))
        if not is_finite(rows):
            raise ModelError(
                f'the changed weight of "{name}" does not fit {str(weight.dtype).removeprefix("torch.")}',
                where=str(self.path),
                fix="use a base model of wider numbers",
            )
