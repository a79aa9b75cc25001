"""What comes out of a run: a recipe that rebuilds a module, and its tensors.

An artifact on disk is a folder with ``fused.json`` (the recipe and what a user should know) and
``model.safetensors``. It loads in a process that has neither the run's configuration nor the user's code.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse.core.errors import ArtifactError, FedfuseError, ModelError
from fedfuse.core.files import write_atomically
from fedfuse.core.payload import Payload
from fedfuse.core.registry import RECIPES
from fedfuse.core.seeding import Rng

Recipe = Mapping[str, Any]
"""JSON that rebuilds a module: ``{"kind": NAME_IN_RECIPES, ...}``. Nested recipes build nested modules."""

_FORMAT = 1

# Torch says RuntimeError where a size is absurd or memory does not suffice.
_BROKEN = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


def build(recipe: Recipe) -> nn.Module:
    """Build the module that a recipe describes, with fresh weights.

    Args:
        recipe: its ``kind`` names a builder in the registry of recipes.

    Returns:
        The module, on the CPU, in training mode.

    Raises:
        ModelError: the recipe has no kind, or the builder cannot use it.
    """
    kind = recipe.get("kind") if isinstance(recipe, Mapping) else None
    if not isinstance(kind, str):
        raise ModelError(f'the recipe has no "kind": {recipe!s:.80}', fix="a recipe is a table with a kind")
    try:
        module: nn.Module = RECIPES.get(kind)(recipe)
    except FedfuseError:
        raise
    except _BROKEN as error:
        raise ModelError(
            f'the recipe of kind "{kind}" is broken: {type(error).__name__}: {error}', where=f"{recipe!s:.80}"
        ) from error
    return module


@dataclass(frozen=True)
class ModelSpec:
    """An architecture with the weights that everyone starts from.

    Both sides of a federation hold the same specification, so the first weights need not travel.

    Args:
        recipe: what rebuilds the module.
        seed: where initial weights are drawn from when ``initial`` is not given.
        initial: initial state dict, for instance pre-trained weights; empty means drawn from ``seed``.
        template: a module of the user's own that no recipe can describe; it is copied instead of built.
        input_shape: shape of one input, without the batch dimension.
        num_classes: number of outputs.
    """

    recipe: Recipe
    seed: int
    input_shape: tuple[int, ...]
    num_classes: int
    initial: Mapping[str, Tensor] = field(default_factory=dict)
    template: nn.Module | None = None

    def build(self) -> nn.Module:
        """A module with the initial weights; every call gives a new one with equal weights."""
        with Rng(self.seed).ambient("initial weights"):
            module = copy.deepcopy(self.template) if self.template is not None else build(self.recipe)
        if self.initial:
            load_state(module, self.initial)
        return module

    def example_input(self, batch_size: int = 2) -> Tensor:
        """Random inputs that the model accepts.

        Args:
            batch_size: how many.

        Returns:
            Shape ``(batch_size, *input_shape)``, the same every time.
        """
        return torch.randn((batch_size, *self.input_shape), generator=Rng(self.seed).torch("example input"))

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides the model and its first weights."""
        facts = json.dumps([self.recipe, self.seed, list(self.input_shape), self.num_classes], sort_keys=True)
        # A module that no recipe describes is at least told apart by its layers.
        layers = "" if self.template is None else str(self.template)
        return hashlib.sha256((facts + layers).encode() + Payload(dict(self.initial)).encode()).hexdigest()


def load_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict and say clearly what does not fit.

    Args:
        module: changed in place.
        state: name to tensor; keys and shapes must agree with the module's own; other
            precisions are turned into its own.

    Raises:
        ModelError: they do not.
    """
    own = module.state_dict()
    missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or extra:
        raise ModelError(
            "the weights do not fit the model: "
            f"missing {missing[:3] or 'nothing'}, unexpected {extra[:3] or 'nothing'}",
            fix="use weights of the same architecture",
        )
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            have, want = tuple(tensor.shape), tuple(own[name].shape)
            raise ModelError(
                f'the weights do not fit the model: "{name}" has shape {have}, wanted {want}',
                fix="use weights of the same architecture",
            )
    module.load_state_dict(dict(state))


def detached_state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state dict on the CPU; tied tensors are copied apart.

    Args:
        module: left as it is.

    Returns:
        Name to tensor in the module's order.
    """
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in module.state_dict().items()}


@dataclass(frozen=True)
class Artifact:
    """A recipe and the tensors that go with it.

    Args:
        recipe: rebuilds the module.
        state: state dict of that module.
        template: the user's module where no recipe can describe it.
        info: what a user of the artifact should know (classes, method, digests of what went in); JSON.
    """

    recipe: Recipe
    state: Mapping[str, Tensor]
    template: nn.Module | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: ModelSpec, state: Mapping[str, Tensor]) -> Artifact:
        """The artifact of one plain model.

        Args:
            spec: its architecture.
            state: its weights.
        """
        return cls(recipe=spec.recipe, state=dict(state), template=spec.template)

    def module(self) -> nn.Module:
        """The working module, in evaluation mode."""
        module = copy.deepcopy(self.template) if self.template is not None else build(self.recipe)
        load_state(module, self.state)
        return module.eval()

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return Payload(dict(self.state)).num_bytes

    def digest(self) -> str:
        """SHA-256 of the recipe and the tensors: equal models have equal digests."""
        recipe = json.dumps(self.recipe, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(recipe.encode() + Payload(dict(self.state)).encode()).hexdigest()

    def save(self, folder: str | Path) -> Path:
        """Write ``fused.json`` and ``model.safetensors``.

        Args:
            folder: made if it is not there.

        Returns:
            The folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"format": _FORMAT, "recipe": self.recipe, "digest": self.digest(), "info": self.info}
        write_atomically(folder / "model.safetensors", Payload(dict(self.state)).encode())
        write_atomically(folder / "fused.json", json.dumps(facts, indent=2, sort_keys=True).encode())
        return folder

    @classmethod
    def read(cls, folder: str | Path, template: nn.Module | None = None) -> Artifact:
        """Read a folder that :meth:`save` wrote.

        Args:
            folder: the artifact's folder.
            template: the user's module, needed only where no recipe could describe it.

        Raises:
            ArtifactError: the folder is no artifact, or its digest does not agree with its content.
        """
        folder = Path(folder)
        try:
            facts = json.loads((folder / "fused.json").read_text(encoding="utf-8"))
            state = Payload.decode((folder / "model.safetensors").read_bytes())
            recipe, digest = facts["recipe"], facts["digest"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArtifactError(
                f"this is no artifact: {error}",
                where=str(folder),
                fix="name a folder that holds fused.json and model.safetensors",
            ) from None
        except FedfuseError as error:
            raise ArtifactError(
                f"model.safetensors is broken: {error.what}", where=str(folder), fix="copy the artifact again"
            ) from None
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        artifact = cls(recipe=recipe, state=tensors, template=template, info=facts.get("info", {}))
        if artifact.digest() != digest:
            raise ArtifactError(
                "the artifact's content does not agree with its digest",
                where=str(folder),
                fix="it was changed or damaged: copy it again",
            )
        return artifact


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load an artifact as a working module.

    Args:
        path: the artifact's folder, or a run's folder that holds one.
        model: a module of the same architecture; needed only where the run's model was the user's own and could not
            be described by a recipe.

    Returns:
        The module in evaluation mode, on the CPU.

    Raises:
        ArtifactError: there is no whole artifact.
    """
    folder = Path(path)
    if not (folder / "fused.json").exists() and (folder / "artifact" / "fused.json").exists():
        folder = folder / "artifact"
    return Artifact.read(folder, template=model).module()
