"""The LoRA factors in a foundation model's state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.errors import ConfigError, ModelError
from fedfuse.models.foundation.foundation import Foundation
from fedfuse.models.foundation.transformers import with_peft
from fedfuse.ops.lora import Factors

_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


@dataclass(frozen=True)
class LoraModule:
    """Where the factors of one weight stand.

    Args:
        right_key: key of A in the state, shape ``(rank, d_in)``.
        left_key: key of B, shape ``(d_out, rank)``.
        shape: ``(d_out, d_in)``.
        scale: what B A is multiplied by.
    """

    right_key: str
    left_key: str
    shape: tuple[int, int]
    scale: float


@dataclass(frozen=True)
class LoraLayout:
    """Where a state keeps its LoRA factors.

    Args:
        modules: name of a linear module to where its factors stand, in sorted order.
        others: keys of what is trained besides, such as a head.
        rank: of all factors.
        has_magnitudes: whether the adapter is DoRA: its change is not B A alone.
    """

    modules: Mapping[str, LoraModule]
    others: tuple[str, ...]
    rank: int
    has_magnitudes: bool = False

    def factors(self, state: Mapping[str, Tensor]) -> dict[str, Factors]:
        """The change of every weight.

        Args:
            state: of a model with this layout.

        Returns:
            Module name to factors in float64, with the scale in the left one.
        """
        return {
            name: Factors(module.scale * state[module.left_key].double(), state[module.right_key].double())
            for name, module in self.modules.items()
        }

    def state(self, factors: Mapping[str, Factors], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state that holds these changes.

        Args:
            factors: module name to change, of this layout's rank or lower: the rest is filled with zeros.
            others: what is trained besides.

        Returns:
            Key to tensor; factors in float32.

        Raises:
            ModelError: a change has a higher rank.
        """
        state = {key: others[key] for key in self.others}
        for name, module in self.modules.items():
            change = factors[name]
            if change.rank > self.rank:
                raise ModelError(
                    f"a change of rank {change.rank} does not fit an adapter of rank {self.rank}",
                    where=name,
                    fix="build the layout with a higher rank",
                )
            left = torch.zeros(module.shape[0], self.rank, dtype=torch.float64)
            right = torch.zeros(self.rank, module.shape[1], dtype=torch.float64)
            left[:, : change.rank] = change.left / module.scale
            right[: change.rank] = change.right
            state[module.left_key], state[module.right_key] = left.float(), right.float()
        return state


def lora_layout(spec: ModelSpec) -> LoraLayout:
    """Where the state of a model keeps its LoRA factors.

    Args:
        spec: the model.

    Raises:
        ConfigError: the model has no LoRA adapter.
    """
    module = spec.build()
    state = module.state_dict()
    names = sorted(key.removesuffix(_A) for key in state if key.endswith(_A))
    if not names or not isinstance(module, Foundation):
        raise ConfigError(
            "the model has no LoRA adapter", where="model.peft", fix="set model.peft to {kind: lora, rank: 8}"
        )
    modules = {}
    for name in names:
        right, left = state[name + _A], state[name + _B]
        scale = module.get_submodule(name).scaling["default"]  # type: ignore[index]
        modules[name] = LoraModule(name + _A, name + _B, (left.shape[0], right.shape[1]), float(scale))
    factors = {key for m in modules.values() for key in (m.right_key, m.left_key)}
    others = tuple(key for key in state if key not in factors)
    return LoraLayout(
        modules, others, state[names[0] + _A].shape[0], any("lora_magnitude_vector" in key for key in others)
    )


def with_rank(spec: ModelSpec, rank: int, lora_alpha: float | None = None) -> ModelSpec:
    """The same base with an adapter of another rank.

    Args:
        spec: a model with a LoRA adapter.
        rank: of the new one, at least 1.
        lora_alpha: numerator of its scale; the rank, for a scale of 1, if left out.
    """
    other = with_peft(spec, kind="lora", rank=rank, lora_alpha=float(rank if lora_alpha is None else lora_alpha))
    # First weights that came with the model are of the old rank.
    return dataclasses.replace(other, initial={})
