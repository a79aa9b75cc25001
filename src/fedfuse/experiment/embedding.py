"""Vectors of training examples by a model, for partitions that go by them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from torch import Tensor, nn

from fedfuse import models
from fedfuse.core.errors import ConfigError
from fedfuse.core.registry import MODELS
from fedfuse.core.settings import to_json
from fedfuse.data.dataset import Dataset
from fedfuse.data.normalize import resolve_normalization
from fedfuse.data.partitions.assignment import Embed
from fedfuse.data.partitions.embedding import Embedding
from fedfuse.experiment.configuration import Config, family_of, named
from fedfuse.models.blocks import cut_spec
from fedfuse.training import predict

_BATCH = 64


class Embedder:
    """Makes vectors of data sets, and keeps them: they are the same for every seed."""

    def __init__(self) -> None:
        self._known: dict[str, Tensor] = {}

    def of(self, config: Config, partition: Any) -> Embed | None:
        """What makes vectors for a partition.

        Args:
            config: its model is asked where the partition names none.
            partition: the partition.

        Returns:
            The function; ``None`` where the partition asks for no model.

        Raises:
            ConfigError: the model cannot be.
        """
        if not isinstance(partition, Embedding) or partition.features != "model":
            return None
        name, settings = _family(config, partition)

        def embed(dataset: Dataset) -> Tensor:
            key = json.dumps([name, settings, config.data.normalize, dataset.input_shape], sort_keys=True)
            if key not in self._known:
                x = resolve_normalization(config.data.normalize, dataset).apply(dataset.train.x)
                self._known[key] = embeddings(name, settings, x, dataset.num_classes)
            return self._known[key]

        return embed


def embeddings(name: str, settings: dict[str, Any], x: Tensor, num_classes: int) -> Tensor:
    """What a model with its first weights gives to its head.

    Args:
        name: of the family.
        settings: of the model.
        x: inputs as models see them, shape ``(n, *input_shape)``.
        num_classes: of the task.

    Returns:
        Shape ``(n, d)``.
    """
    if settings.get("task") == "causal_lm":
        # The hidden states of a language model; the second half of its inputs flags what it learns.
        settings, x = {**settings, "task": "encoder"}, x[:, : x.shape[1] // 2]
    spec = models.spec(name, settings, input_shape=tuple(x.shape[1:]), num_classes=num_classes, seed=0)
    module = spec.build()
    features = getattr(module, "features", None)
    if isinstance(module, nn.Module) and callable(features) and not isinstance(features, nn.Module):
        module.eval()
        return predict(features, x, batch_size=_BATCH).flatten(1)
    return predict(cut_spec(spec, 1).copy().blocks[0], x, batch_size=_BATCH).flatten(1)


def _family(config: Config, partition: Embedding) -> tuple[str, dict[str, Any]]:
    own = dict(partition.model)
    if not own:
        name, family = family_of(config.model)
    else:
        name = own.pop("family", None)
        if not isinstance(name, str):
            raise ConfigError(
                'the setting "family" is missing',
                where="data.partition.model.family",
                fix=f"known: {', '.join(MODELS.names())}",
            )
        family = named(MODELS, name, own, "data.partition.model", "family")
    return name, to_json(family) if dataclasses.is_dataclass(family) else dict(own)
