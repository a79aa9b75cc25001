"""Dense mixtures of adapters, with parts whose shape no model decides, and models that have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.core.artifact import Recipe
from fedfuse.core.examples import Examples
from fedfuse.core.judging import Evaluation
from fedfuse.core.seeding import Rng
from fedfuse.models.blocks import Pieces
from fedfuse.models.foundation.foundation import Foundation
from fedfuse.models.fused import channel_dim

_NOISE = 0.1


@dataclass(frozen=True)
class MixtureShape:
    """What all clients agree on, whatever their models are.

    Args:
        num_positions: places in a model that get a mixture, at least 1.
        num_experts: experts of each mixture: one per size of model, at least 1.
        rank: width of the experts, at least 1.
        seed: the experts' first weights are drawn from it.
    """

    num_positions: int
    num_experts: int
    rank: int
    seed: int

    def first_shared(self) -> dict[str, Tensor]:
        """The first weights of all that is shared: experts near the identity, and equal shares of them.

        Returns:
            Name in the state of a model with mixtures to tensor.
        """
        found: dict[str, Tensor] = {}
        for position in range(self.num_positions):
            for expert in range(self.num_experts):
                draw = Rng(self.seed).torch("expert", position, expert)
                noise = torch.randn(self.rank, self.rank, generator=draw) * _NOISE / self.rank**0.5
                found[f"mixtures.{position}.experts.{expert}"] = torch.eye(self.rank) + noise
            found[f"mixtures.{position}.shares"] = torch.zeros(self.num_experts)
        return found


class DenseMixture(nn.Module):
    """Experts between a projection down and one up, all active: h + up(gelu(sum_e share_e E_e down(h))).

    The shares are the softmax of learned numbers. The way up begins at zero, so that at first nothing is added.

    Args:
        channels: width of what comes in and goes out.
        experts: first weights, each of shape ``(rank, rank)``.
    """

    def __init__(self, channels: int, experts: Sequence[Tensor]) -> None:
        super().__init__()
        rank = experts[0].shape[0]
        self.down = nn.Parameter(torch.randn(channels, rank) / channels**0.5)
        self.up = nn.Parameter(torch.zeros(rank, channels))
        self.experts = nn.ParameterList([nn.Parameter(expert.clone()) for expert in experts])
        self.shares = nn.Parameter(torch.zeros(len(experts)))

    def forward(self, h: Tensor) -> Tensor:
        """Add what the experts say.

        Args:
            h: images ``(n, channels, height, width)``, tokens ``(n, t, channels)`` or vectors ``(n, channels)``.

        Returns:
            The same shape.
        """
        dim = channel_dim(h.ndim)
        inner = F.gelu(h.movedim(dim, -1) @ self.down @ self.mixed())
        return h + (inner @ self.up).movedim(-1, dim)

    def mixed(self) -> Tensor:
        """The mean of the experts by their shares, shape ``(rank, rank)``."""
        return torch.einsum("e,erk->rk", self.shares.softmax(0), torch.stack(list(self.experts)))


def expert_of(name: str) -> int | None:
    """The number of the expert that a tensor is.

    Args:
        name: in the state of a model with mixtures.

    Returns:
        ``None`` if it is no expert.

    Example:
        >>> expert_of("mixtures.0.experts.2"), expert_of("mixtures.0.shares")
        (2, None)
    """
    parts = name.split(".")
    return int(parts[3]) if is_shared(name) and parts[2] == "experts" else None


def is_shared(name: str) -> bool:
    """Whether a tensor of a model with mixtures is of a shape that all clients have in common.

    Args:
        name: in the model's state.

    Example:
        >>> [is_shared(f"mixtures.0.{name}") for name in ("experts.1", "shares", "up")]
        [True, True, False]
    """
    parts = name.split(".")
    return parts[0] == "mixtures" and parts[2] in ("experts", "shares")


@dataclass(frozen=True)
class Place:
    """Where a mixture stands.

    Args:
        name: of the block behind which it is.
        channels: width there.
    """

    name: str
    channels: int


class Tuned(nn.Module):
    """A model with mixtures behind some of its blocks.

    Args:
        mixtures: one per place.
        recipe: rebuilds this module; ``None`` where no recipe can.
    """

    def __init__(self, mixtures: Sequence[DenseMixture], recipe: Recipe | None) -> None:
        super().__init__()
        self.mixtures = nn.ModuleList(mixtures)
        self.recipe = recipe

    def own(self) -> dict[str, Tensor]:
        """The part of its state that is the client's own."""
        return {name: tensor for name, tensor in self.state_dict().items() if not is_shared(name)}

    def shared(self) -> dict[str, Tensor]:
        """The part of its state that all clients have in common."""
        return {name: tensor for name, tensor in self.state_dict().items() if is_shared(name)}


class TunedPieces(Tuned):
    """A model in pieces, with a mixture behind each piece.

    Args:
        pieces: the model.
        mixtures: one per block.
        recipe: rebuilds this module.
    """

    def __init__(self, pieces: Pieces, mixtures: Sequence[DenseMixture], recipe: Recipe | None) -> None:
        super().__init__(mixtures, recipe)
        self.blocks, self.head = nn.ModuleList(pieces.blocks), pieces.head

    def forward(self, x: Tensor) -> Tensor:
        """Classify.

        Args:
            x: shape ``(n, *input_shape)``.

        Returns:
            Logits, shape ``(n, num_classes)``.
        """
        for block, mixture in zip(self.blocks, self.mixtures, strict=True):
            x = mixture(block(x))
        logits: Tensor = self.head(x)
        return logits


class TunedFoundation(Tuned):
    """A foundation model with mixtures behind some of its layers.

    Args:
        net: the model.
        mixtures: one per place.
        places: where they stand.
        recipe: rebuilds this module.
    """

    def __init__(
        self, net: Foundation, mixtures: Sequence[DenseMixture], places: Sequence[Place], recipe: Recipe | None
    ) -> None:
        super().__init__(mixtures, recipe)
        self.net = net
        for place, mixture in zip(places, mixtures, strict=True):
            self.net.get_submodule(place.name).register_forward_hook(_Behind(mixture))

    def forward(self, x: Tensor) -> Tensor:
        """Answer as the model does.

        Args:
            x: as the model takes it.

        Returns:
            What the model gives.
        """
        answer: Tensor = self.net(x)
        return answer


class TunedWriter(TunedFoundation):
    """A foundation model with mixtures that knows its objective and judges itself, such as a language model."""

    net: Any

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """The model's loss.

        Args:
            x: inputs.
            y: labels.

        Returns:
            A scalar.
        """
        loss: Tensor = self.net.objective(x, y)
        return loss

    def judge(self, examples: Examples, *, device: torch.device | str = "cpu") -> Evaluation:
        """How good it is.

        Args:
            examples: at least one.
            device: where.
        """
        seen: Evaluation = self.net.judge(examples, device=device)
        return seen


class TunedGenerator(TunedWriter):
    """A language model with mixtures."""

    @property
    def tokenizer(self) -> str:
        """What turns tokens into text."""
        return str(self.net.tokenizer)

    @property
    def num_generated(self) -> int:
        """How many answers are written when it is judged."""
        return int(self.net.num_generated)

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Continue each prompt.

        Args:
            prompts: token ids.
            max_new_tokens: most tokens to add.

        Returns:
            The added tokens of each prompt.
        """
        found: list[list[int]] = self.net.generate(prompts, max_new_tokens)
        return found


class _Behind:
    """Puts a mixture behind a layer; an object, so that a copied model has hooks that know the copied mixture."""

    def __init__(self, mixture: DenseMixture) -> None:
        self.mixture = mixture

    def __call__(self, layer: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self.mixture(output)
        # Some layers give more than their hidden states.
        return (self.mixture(output[0]), *output[1:])
