"""The clients' models as teachers: frozen, in evaluation mode, asked all together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedfuse.core.artifact import Recipe, detached_state
from fedfuse.core.errors import ModelError
from fedfuse.core.payload import Payload
from fedfuse.models.ensemble import check_classifies
from fedfuse.ops.distillation import batchnorm_distance, channel_moments


class Teachers:
    """Several frozen models that answer side by side.

    Args:
        models: map inputs to logits; they are taken over, frozen and put into evaluation mode.
        device: where they compute.
        weights: of each model in the common answer, shape ``(num_models,)``; equal if left out. They sum to 1.
        recipes: what rebuilds each model; needed only where the models are part of the result.
        is_opaque: whether a recipe does not describe its model, which is a user's own module.

    Raises:
        ModelError: there is none.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        *,
        device: torch.device | str = "cpu",
        weights: Tensor | None = None,
        recipes: Sequence[Recipe] = (),
        is_opaque: bool = False,
    ) -> None:
        if not models:
            raise ModelError("there is nobody to learn from", fix="give at least one model")
        check_classifies(models)
        self.models = [model.to(device).eval().requires_grad_(False) for model in models]
        for model in self.models:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device, self.recipes, self.is_opaque = torch.device(device), list(recipes), is_opaque
        found = torch.full((len(models),), 1 / len(models)) if weights is None else weights.float() / weights.sum()
        self.weights = found.to(device)
        self._norms = [[m for m in model.modules() if _has_statistics(m)] for model in self.models]

    @property
    def has_batchnorm(self) -> bool:
        """Whether any model has BatchNorm layers that remember statistics."""
        return any(self._norms)

    @property
    def digest(self) -> str:
        """SHA-256 of all weights."""
        digests = [Payload(dict(detached_state(model))).digest() for model in self.models]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def logits(self, x: Tensor) -> Tensor:
        """Every model's answer.

        Args:
            x: inputs, shape ``(n, *input_shape)``.

        Returns:
            Shape ``(num_models, n, num_classes)``.
        """
        return torch.stack([model(x).float() for model in self.models])

    def mix(self, logits: Tensor, weights: Tensor | None = None) -> Tensor:
        """The common answer: the weighted mean of logits.

        Args:
            logits: shape ``(num_models, n, num_classes)``.
            weights: instead of the teachers' own; they are divided by their sum.

        Returns:
            Shape ``(n, num_classes)``.
        """
        shares = self.weights if weights is None else weights / weights.sum()
        return torch.einsum("m,mnc->nc", shares.to(logits), logits)

    def answer(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """The common answer to inputs.

        Args:
            x: inputs, shape ``(n, *input_shape)``.
            weights: instead of the teachers' own.

        Returns:
            Shape ``(n, num_classes)``.
        """
        return self.mix(self.logits(x), weights)

    @contextmanager
    def watched(self) -> Iterator[Statistics]:
        """Watch what enters the BatchNorm layers of all models.

        Yields:
            What is seen; ask it after each pass.
        """
        statistics = Statistics(len(self.models))
        handles = [
            norm.register_forward_pre_hook(statistics.hook(position))
            for position, norms in enumerate(self._norms)
            for norm in norms
        ]
        try:
            yield statistics
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def penultimate(self) -> Iterator[list[Tensor | None]]:
        """Watch what enters the last linear layer of every model.

        Yields:
            One tensor per model after each pass; ``None`` where a model has no linear layer.
        """
        seen: list[Tensor | None] = [None] * len(self.models)

        def hook(position: int) -> Any:
            def watch(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                # The last that is passed stays.
                seen[position] = inputs[0]

            return watch

        handles = [
            module.register_forward_pre_hook(hook(position))
            for position, model in enumerate(self.models)
            for module in model.modules()
            if isinstance(module, nn.Linear)
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


class Statistics:
    """How far the batch that went through some models is from what their BatchNorm layers remember.

    Args:
        num_models: number of models watched.
    """

    def __init__(self, num_models: int) -> None:
        self._found: list[list[Tensor]] = [[] for _ in range(num_models)]

    def hook(self, position: int) -> Any:
        """What is called before a layer of a model.

        Args:
            position: of the model.
        """

        def watch(layer: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
            mean, var = channel_moments(inputs[0])
            assert layer.running_mean is not None
            assert layer.running_var is not None
            self._found[position].append(batchnorm_distance(mean, var, layer.running_mean, layer.running_var))

        return watch

    def distance(self) -> Tensor:
        """The distance since it was last asked: summed over layers, averaged over models.

        Returns:
            A scalar with gradients to the inputs; 0 where no layer was passed.
        """
        found = [torch.stack(distances).sum() for distances in self._found if distances]
        num_models = len(self._found)
        self._found = [[] for _ in range(num_models)]
        return torch.stack(found).sum() / num_models if found else torch.zeros(())


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
