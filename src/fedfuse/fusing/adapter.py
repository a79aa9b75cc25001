"""An adapter's folder as PEFT writes it, read without PEFT."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fedfuse.core.errors import ArtifactError
from fedfuse.core.payload import PayloadFile
from fedfuse.fusing.adapter_config import FILE as CONFIG_FILE
from fedfuse.fusing.adapter_config import PREFIX, AdapterConfig
from fedfuse.fusing.pipeline_file import ALPHA, read_config
from fedfuse.fusing.pipeline_file import FILE as PIPELINE_FILE
from fedfuse.ops.lora import Factors, is_finite
from fedfuse.rules.reading import Upload

FILE = "adapter_model.safetensors"
BIAS = ".lora_B.bias"
"""What stands behind a module's name in the key of a bias of B."""

# What PEFT calls the parts of one module's adapter.
_LEFT = (".lora_B.weight", ".lora_embedding_B")
_RIGHT = (".lora_A.weight", ".lora_embedding_A")
# What diffusers and programs beside it call them in their own files.
_PIPELINE_LEFT = (".lora_B.weight", ".lora.up.weight", ".lora_linear_layer.up.weight", ".lora_up.weight")
_PIPELINE_RIGHT = (".lora_A.weight", ".lora.down.weight", ".lora_linear_layer.down.weight", ".lora_down.weight")
_MAGNITUDES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")


@dataclass(frozen=True)
class Place:
    """Where the adapter of one module is stored, and what it looks like.

    Args:
        prefix: what stands before the module's name in the file.
        left: the key of B, behind prefix and name.
        right: the key of A, behind prefix and name.
        left_shape: of B as stored; convolutions have more than two sizes.
        right_shape: of A as stored.
        has_bias: whether B has a bias.
        magnitude: the key of DoRA's magnitude, behind prefix and name; empty if there is none.
    """

    prefix: str
    left: str
    right: str
    left_shape: tuple[int, ...]
    right_shape: tuple[int, ...]
    has_bias: bool = False
    magnitude: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the change: ``(d_out, d_in)``, where a convolution's kernel counts into ``d_in``."""
        return self.left_shape[0], torch.Size(self.right_shape[1:]).numel()

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.right_shape[0]

    @property
    def is_embedding(self) -> bool:
        """Whether the weight that it changes is stored the other way round."""
        return self.left == _LEFT[1]

    def stored(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """Factors in the shapes in which this module's are stored.

        Args:
            factors: of any rank.

        Returns:
            B and A.
        """
        left, right = factors.left, factors.right
        return left.reshape(*left.shape, *self.left_shape[2:]), right.reshape(len(right), *self.right_shape[1:])


class Adapter:
    """An adapter's settings, and its tensors read when they are asked for.

    Used as a context manager: its file is open inside the block.

    Args:
        folder: what ``save_pretrained`` of PEFT wrote, or ``save_lora_weights`` of a diffusers pipeline.

    Raises:
        ArtifactError: it is no LoRA adapter, or its file and its settings disagree.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_pipeline = (folder / PIPELINE_FILE).is_file() and not (folder / CONFIG_FILE).is_file()
        file = folder / (PIPELINE_FILE if self.is_pipeline else FILE)
        self._tails = (_PIPELINE_LEFT, _PIPELINE_RIGHT) if self.is_pipeline else (_LEFT, _RIGHT)
        self.config = read_config(file, _PIPELINE_RIGHT) if self.is_pipeline else AdapterConfig.read(folder)
        if not file.is_file():
            has_pickle = (folder / "adapter_model.bin").is_file()
            raise ArtifactError(
                "there is only adapter_model.bin, a pickle that may run code when it is read"
                if has_pickle
                else f"there is no {FILE}",
                where=str(folder),
                fix="save it as safetensors: load it with PEFT, then save_pretrained(folder)",
            )
        self.file = PayloadFile(file)
        self._upload = Upload(self.file)
        self._memory = torch.empty(0)
        self.modules, self.wholes = self._sorted_keys()
        self._check_ranks()

    def __enter__(self) -> Adapter:
        self._upload = Upload(self.file, stays_open=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._upload.close()

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that make it up."""
        return (PIPELINE_FILE,) if self.is_pipeline else (CONFIG_FILE, FILE)

    @property
    def num_bytes(self) -> int:
        """Size of its tensors' file."""
        return self.file.path.stat().st_size

    @property
    def num_parameters(self) -> int:
        """Numbers in its tensors."""
        return sum(torch.Size(self.looks(key)[0]).numel() for key in self.file)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of its tensors' file, as ``sha256sum`` prints it."""
        with self.file.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def beginning(self) -> str:
        """SHA-256 of the first megabyte of its tensors' file, which tells adapters apart in no time."""
        with self.file.path.open("rb") as file:
            return hashlib.sha256(file.read(1 << 20)).hexdigest()

    @cached_property
    def dtype(self) -> torch.dtype:
        """The narrowest that holds all of its floating-point tensors."""
        found = [dtype for key in self.file if (dtype := self.looks(key)[1]).is_floating_point]
        widest = found[0]
        for dtype in found:
            widest = torch.promote_types(widest, dtype)
        return widest

    def factors(self, module: str) -> Factors:
        """The change of one module's weight, with the scale in the left factor.

        Args:
            module: its name in the base model.

        Returns:
            The factors.
        """
        place = self.modules[module]
        left = self._wide(place.prefix + module + place.left).reshape(place.left_shape[0], place.rank)
        right = self._wide(place.prefix + module + place.right).reshape(place.rank, -1)
        scale = self.config.scale_of(module)
        return Factors(left if scale == 1 else left.mul_(scale), right)

    def bias(self, module: str) -> Tensor:
        """The bias of a module's B, with the scale in it.

        Args:
            module: its name in the base model, one whose B has a bias.

        Returns:
            Shape ``(d_out,)``, float64.
        """
        return self.tensor(self.modules[module].prefix + module + BIAS).double() * self.config.scale_of(module)

    def magnitude(self, module: str) -> Tensor:
        """DoRA's magnitudes of a module's weight.

        Args:
            module: its name in the base model, one that has them.

        Returns:
            The tensor.
        """
        place = self.modules[module]
        return self.tensor(place.prefix + module + place.magnitude)

    def tensor(self, key: str) -> Tensor:
        """One tensor as it is stored, looked through for numbers that are none.

        Args:
            key: in the file.

        Returns:
            The tensor.

        Raises:
            ArtifactError: it holds NaN or infinity.
        """
        shape, dtype = self.looks(key)
        return self._read(key, torch.empty(torch.Size(shape).numel(), dtype=dtype)).view(shape)

    def _wide(self, key: str) -> Tensor:
        """One floating-point tensor as float64, flat, in memory of its own."""
        shape, dtype = self.looks(key)
        size = torch.Size(shape).numel()
        # What is read over and over again stays in a core's cache.
        if self._memory.dtype != dtype or len(self._memory) < size:
            self._memory = torch.empty(size, dtype=dtype)
        return self._read(key, self._memory[:size]).to(torch.float64, copy=True)

    def _read(self, key: str, into: Tensor) -> Tensor:
        value = self._upload.read(key, 0, into)
        if value.is_floating_point() and not is_finite(value):
            raise ArtifactError(
                f'the adapter holds NaN or infinity in "{key}"',
                where=str(self.folder),
                fix="its training has failed: leave it out, or train it again with a lower learning rate",
            )
        return value

    def looks(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor.

        Args:
            key: in the file.

        Returns:
            Both.

        Raises:
            ArtifactError: it has numbers that cannot be fused, such as 8-bit floats.
        """
        looks = self._upload.looks(key)
        if looks is None or (looks[1].is_floating_point and looks[1].itemsize < 2):
            raise ArtifactError(f'"{key}" is of a type that cannot be fused', where=str(self.folder))
        return looks

    def _sorted_keys(self) -> tuple[dict[str, Place], list[str]]:
        """The modules' places by name, and the keys of tensors that are saved whole."""
        keys = set(self.file)
        modules: dict[str, Place] = {}
        for left, right in zip(*self._tails, strict=True):
            for key in sorted(keys):
                if key.endswith(right):
                    stem = key.removesuffix(right)
                    prefix = PREFIX if stem.startswith(PREFIX) else ""
                    modules[stem.removeprefix(prefix)] = self._place(keys, stem, prefix, left, right)
        used = {
            place.prefix + name + tail
            for name, place in modules.items()
            for tail in (place.left, place.right, place.magnitude, BIAS if place.has_bias else "")
            if tail
        }
        if self.is_pipeline:
            used |= {name + ALPHA for name in modules}
        rest = sorted(keys - used)
        odd = next((key for key in rest if ".lora_" in key), None)
        if odd is not None:
            is_left = any(odd.endswith(tail) for tail in self._tails[0])
            raise ArtifactError(
                f'the adapter has "{odd}" without its A' if is_left else f'the adapter has "{odd}", which is no LoRA',
                where=str(self.folder),
                fix="the file is not whole: copy it again" if is_left else "merge it into its base and fuse those",
            )
        if not modules:
            raise ArtifactError(
                "the adapter has no LoRA tensors", where=str(self.folder), fix="copy it again, or save it again by PEFT"
            )
        return modules, rest

    def _place(self, keys: set[str], stem: str, prefix: str, left: str, right: str) -> Place:
        if stem + left not in keys:
            raise ArtifactError(
                f'the adapter has "{stem + right}" without its B',
                where=str(self.folder),
                fix="the file is not whole: copy it again",
            )
        magnitude = next((tail for tail in _MAGNITUDES if stem + tail in keys), "")
        left_shape, right_shape = self.looks(stem + left)[0], self.looks(stem + right)[0]
        place = Place(prefix, left, right, left_shape, right_shape, stem + BIAS in keys, magnitude)
        fits = len(left_shape) >= 2 and len(right_shape) >= 2 and left_shape[1] == right_shape[0]
        if not fits or torch.Size(left_shape[2:]).numel() != 1:
            raise ArtifactError(
                f'B {left_shape} and A {right_shape} of "{stem}" do not fit together',
                where=str(self.folder),
                fix="convolutions with groups cannot be fused; else copy the adapter again",
            )
        return place

    def _check_ranks(self) -> None:
        for name, place in self.modules.items():
            stated = self.config.rank_of(name)
            if stated != place.rank:
                raise ArtifactError(
                    f'"{name}" has rank {place.rank}, its settings say {stated}',
                    where=str(self.folder),
                    fix="settings and tensors are of different adapters: copy both again",
                )
            if place.rank >= min(place.shape):
                raise ArtifactError(
                    f'the rank {place.rank} of "{name}" is not below the dimensions of its weight, '
                    f"{place.shape[0]} x {place.shape[1]}",
                    where=str(self.folder),
                    fix="train with a lower rank, or merge it into its base and fuse the checkpoints",
                )
            if bool(place.magnitude) != self.config.is_dora:
                raise ArtifactError(
                    f'"{name}" has {"a" if place.magnitude else "no"} magnitude, its settings say use_dora '
                    f"{str(self.config.is_dora).lower()}",
                    where=str(self.folder),
                    fix="settings and tensors are of different adapters: copy both again",
                )
