"""Skew by content: examples with similar embeddings are one cluster, and clusters are split by Dirichlet draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.registry import register_partition
from fedfuse.core.seeding import derive_seed
from fedfuse.data.checks import check_at_least, optional_module
from fedfuse.data.dataset import Dataset
from fedfuse.data.partitions.assignment import Embed
from fedfuse.data.partitions.dirichlet import Dirichlet

CLUSTERS = "embedding_cluster"
"""Name of the column that says which cluster an example belongs to."""

_SEED = derive_seed(0, "embedding clusters") % 2**32
_TOPICS = 64
_STARTS = 4


@register_partition("embedding")
@dataclass(frozen=True, kw_only=True)
class Embedding(Dirichlet):
    """Clusters of embeddings are split by Dirichlet draws, as classes are under ``dirichlet``: skew without labels.

    The clusters, by k-means, depend on the data alone; the run's seed decides which client gets how much of each.

    Args:
        num_clients: K, at least 1.
        dirichlet_alpha: concentration, above 0; small is skewed.
        min_examples: fewest examples of a client, at least 1.
        balanced: use the balanced rule of ``dirichlet``.
        max_draws: after so many draws without success it ends with an error, at least 1.
        num_clusters: how many clusters there are, at least 2.
        features: what is clustered: the ``inputs`` as they are; the ``tokens`` of texts, weighed by how rare they are
            (tf-idf) and brought to 64 dimensions; the features of a ``model``; ``auto`` is ``tokens`` for texts, else
            ``inputs``.
        model: of ``features: model``: a family and its settings; left out, the federation's own model with its first
            weights, which should be pre-trained.

    Raises:
        ConfigError: a value cannot be used.
    """

    num_clusters: int = 10
    features: Literal["auto", "inputs", "tokens", "model"] = "auto"
    model: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("partition.num_clusters", self.num_clusters, 2)
        if self.model and self.features != "model":
            raise ConfigError(
                f"a model is given, and features is {self.features}",
                where="partition.features",
                fix="set features: model, or leave the model out",
            )

    def columns_of(self, dataset: Dataset, embed: Embed | None = None) -> dict[str, np.ndarray]:
        """Say which cluster every training example belongs to.

        Args:
            dataset: whose training examples.
            embed: makes vectors by a model; needed for ``features: model`` only.

        Returns:
            The column :data:`CLUSTERS`.

        Raises:
            ConfigError: these features cannot be made of this data.
            DataError: there are too few different examples.
        """
        return {CLUSTERS: cluster(self._vectors(dataset, embed), self.num_clusters)}

    def _vectors(self, dataset: Dataset, embed: Embed | None) -> np.ndarray:
        features = self.features
        if features == "auto":
            features = "tokens" if dataset.is_coded else "inputs"
        if features == "model":
            if embed is None:
                raise ConfigError(
                    "there is no model to make embeddings",
                    where="partition.features",
                    fix="use a configuration, or features: inputs or tokens",
                )
            found: np.ndarray = embed(dataset).flatten(1).float().numpy()
            return found
        if (features == "tokens") != dataset.is_coded:
            raise ConfigError(
                "the inputs are tokens, whose differences mean nothing"
                if dataset.is_coded
                else "the inputs are no tokens",
                where="partition.features",
                fix=f"use features: {'tokens' if dataset.is_coded else 'inputs'}, or model",
            )
        if features == "tokens":
            return token_topics(dataset.train.x)
        return dataset.train.x.flatten(1).float().numpy()

    def assign(
        self, labels: np.ndarray, num_classes: int, rng: np.random.Generator, columns: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Say who gets which examples.

        Args:
            labels: not used.
            num_classes: not used.
            rng: where shares and orders are drawn from.
            columns: must have the column of :meth:`columns_of`.

        Returns:
            Sorted positions by client id.

        Raises:
            ConfigError: nobody made the column.
            DataError: there are too few examples, or no draw gave every client its minimum.
        """
        if CLUSTERS not in columns:
            raise ConfigError(
                f'the data has no column "{CLUSTERS}"',
                where="partition",
                fix="add what Embedding.columns_of gives to the columns; fedfuse.data.federate does",
            )
        return super().assign(columns[CLUSTERS], self.num_clusters, rng, columns)


def cluster(vectors: np.ndarray, num_clusters: int) -> np.ndarray:
    """Bring similar vectors together by k-means.

    Args:
        vectors: shape ``(n, d)``, finite.
        num_clusters: at least 2.

    Returns:
        Number of each vector's cluster, int64, shape ``(n,)``; clusters are numbered by their first example, so that
        the same data always gives the same numbers.

    Raises:
        DataError: there are fewer different vectors than clusters, or scikit-learn is not installed.
    """
    num_different = len(np.unique(vectors, axis=0))
    if num_different < num_clusters:
        raise DataError(
            f"{num_different} different examples cannot make {num_clusters} clusters",
            where="partition",
            fix=f"set num_clusters to {num_different} or less",
        )
    kmeans = optional_module("sklearn.cluster", package="scikit-learn", extra="data").KMeans
    limits = optional_module("threadpoolctl", package="threadpoolctl", extra="data").threadpool_limits
    # One thread: their number changes how sums are rounded, and so perhaps who belongs where.
    with limits(1):
        found = kmeans(num_clusters, n_init=_STARTS, random_state=_SEED).fit_predict(vectors)
    _, first, number = np.unique(found, return_index=True, return_inverse=True)
    order: np.ndarray = np.argsort(np.argsort(first))
    return order[number].astype(np.int64)


def token_topics(x: Tensor) -> np.ndarray:
    """What texts are about, by which tokens stand in them (tf-idf, then the largest singular directions).

    Args:
        x: tokens, shape ``(n, length)``, below 0 is padding; or for prompts with completions ``(n, 2 * length)``, whose
            second half flags what is learnt and is not looked at.

    Returns:
        Vectors of length 1, shape ``(n, d)`` with d at most 64.

    Raises:
        DataError: scikit-learn is not installed.
    """
    text = optional_module("sklearn.feature_extraction.text", package="scikit-learn", extra="data")
    decomposition = optional_module("sklearn.decomposition", package="scikit-learn", extra="data")
    sparse = optional_module("scipy.sparse", package="scipy", extra="data")
    half = x.shape[1] // 2
    flags = x[:, half:]
    if x.shape[1] % 2 == 0 and bool(((flags == 0) | (flags == 1)).all()):
        x = x[:, :half]
    rows, places = torch.nonzero(x >= 0, as_tuple=True)
    # Tokens that nowhere occur cost nothing.
    known, tokens = torch.unique(x[rows, places].round().long(), return_inverse=True)
    counts = sparse.csr_matrix((np.ones(len(rows)), (rows.numpy(), tokens.numpy())), shape=(len(x), len(known)))
    weighed = text.TfidfTransformer().fit_transform(counts)
    size = min(_TOPICS, min(weighed.shape) - 1)
    if size < 1:
        return np.asarray(weighed.todense())
    vectors = decomposition.TruncatedSVD(size, algorithm="arpack", random_state=_SEED).fit_transform(weighed)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    found: np.ndarray = vectors / np.where(lengths > 0, lengths, 1.0)
    return found
