"""A data set and a partition to the clients of a federation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.examples import ClientData, Examples
from fedfuse.core.seeding import Rng
from fedfuse.data.augment import check_augment, default_augment
from fedfuse.data.checks import check_fraction
from fedfuse.data.dataset import Dataset
from fedfuse.data.from_python import from_python
from fedfuse.data.normalize import Normalization, resolve_normalization
from fedfuse.data.partitions.assignment import Partition, check_assignment, client_ids
from fedfuse.data.splitting import stratified_split


@dataclass(frozen=True)
class FederatedData:
    """The data of all clients, and the server's test part.

    Args:
        clients: data by client id, in sorted order; normalised.
        test: for the report only; normalised; ``None`` where there is none.
        class_names: name of each class, in label order.
        input_shape: shape of one input.
        num_classes: number of classes of the whole task.
        normalization: what was applied to all inputs.
        positions: rows of the data set's training part that each client has (training and validation), sorted; empty
            where the data came already split.
    """

    clients: Mapping[str, ClientData]
    test: Examples | None
    class_names: tuple[str, ...]
    input_shape: tuple[int, ...]
    num_classes: int
    normalization: Normalization
    positions: Mapping[str, np.ndarray] = field(default_factory=dict)

    def label_counts(self) -> np.ndarray:
        """Examples per client and class, training and validation together.

        Returns:
            int64, shape ``(num_clients, num_classes)``, rows in client order.
        """
        rows = [
            np.bincount(torch.cat([data.train.y, data.validation.y]).numpy(), minlength=self.num_classes)
            for data in self.clients.values()
        ]
        return np.stack(rows).astype(np.int64)


def federate(
    dataset: Dataset,
    partition: Partition,
    *,
    seed: int,
    validation_fraction: float = 0.1,
    normalize: str | Normalization | Mapping[str, Sequence[float]] = "auto",
    augment: str = "auto",
) -> FederatedData:
    """Split a data set over clients.

    The test part is never touched, except that it is normalised like the rest. Positions depend on the labels, the
    partition and the seed only: changed inputs (see ``fedfuse.data.shifts``) stay with their clients.

    Args:
        dataset: what is split.
        partition: who gets which training examples.
        seed: of the run; the partition and each client's validation part have streams of their own.
        validation_fraction: share of each client's examples that becomes its validation part, in [0, 1), stratified;
            at least one training example remains.
        normalize: see :func:`fedfuse.data.normalize.resolve_normalization`.
        augment: ``auto`` or a name of ``fedfuse.data.augment``.

    Returns:
        Clients in sorted order.

    Raises:
        ConfigError: a setting cannot be used.
        DataError: the partition cannot be made, or is none.
    """
    check_fraction("validation_fraction", validation_fraction)
    augment = _resolve_augment(augment, dataset)
    normalization = resolve_normalization(normalize, dataset)
    labels = dataset.train.y.numpy()
    found = partition.assign(labels, dataset.num_classes, Rng(seed).child("partition").numpy(), dataset.columns)
    positions = check_assignment(found, len(labels))
    clients = {}
    for client_id, rows in positions.items():
        own = dataset.train.subset(rows)
        own = Examples(normalization.apply(own.x), own.y)
        clients[client_id] = _client_data(own, client_id, dataset.num_classes, seed, validation_fraction, augment)
    return FederatedData(
        clients,
        _normalized(dataset.test, normalization),
        dataset.class_names,
        dataset.input_shape,
        dataset.num_classes,
        normalization,
        positions,
    )


def from_clients(
    clients: Mapping[str, Any] | Sequence[Any],
    test: Any = None,
    *,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    validation_fraction: float = 0.1,
    normalize: str | Normalization | Mapping[str, Sequence[float]] = "auto",
    augment: str = "auto",
) -> FederatedData:
    """Make a federation of data that is already split.

    Args:
        clients: one data set per client, of any kind that :func:`fedfuse.data.from_python` takes; by client id, or in
            a sequence whose clients are then called ``client_0``, ``client_1``, ...
        test: the server's test part, of any such kind; for the report only.
        seed: of the run; validation parts are drawn from it.
        class_names: name of each class; numbers where not given, as many as the largest label tells.
        validation_fraction: share of each client's examples that becomes its validation part, in [0, 1).
        normalize: as for :func:`federate`; ``auto`` measures over all clients.
        augment: as for :func:`federate`.

    Returns:
        Clients in sorted order; no positions.

    Raises:
        ConfigError: a setting cannot be used.
        DataError: there is no client, or the data of the clients do not fit together.
    """
    check_fraction("validation_fraction", validation_fraction)
    if not isinstance(clients, Mapping):
        clients = dict(zip(client_ids(max(1, len(clients))), clients, strict=False))
    if not clients:
        raise DataError("there are no clients", where="clients", fix="give one data set per client")
    parts = {client_id: _converted(clients[client_id], client_id) for client_id in sorted(clients)}
    test_part = None if test is None else _converted(test, "test")
    first = next(iter(parts.values()))
    for client_id, part in parts.items():
        if part.x.shape[1:] != first.x.shape[1:]:
            raise DataError(
                f"inputs have shape {tuple(part.x.shape[1:])} here and {tuple(first.x.shape[1:])} "
                f"at {next(iter(parts))}",
                where=client_id,
                fix="bring the inputs of all clients to one shape",
            )
    num_labels = 1 + max(int(part.y.max()) for part in (*parts.values(), test_part) if part is not None)
    names = tuple(class_names) if class_names is not None else tuple(str(c) for c in range(num_labels))
    pooled = Examples(torch.cat([part.x for part in parts.values()]), torch.cat([part.y for part in parts.values()]))
    dataset = Dataset(pooled, test_part, names, is_image=first.x.dim() == 4, name="clients")
    augment = _resolve_augment(augment, dataset)
    normalization = resolve_normalization(normalize, dataset)
    data = {
        client_id: _client_data(
            Examples(normalization.apply(part.x), part.y),
            client_id,
            dataset.num_classes,
            seed,
            validation_fraction,
            augment,
        )
        for client_id, part in parts.items()
    }
    return FederatedData(
        data, _normalized(test_part, normalization), names, dataset.input_shape, dataset.num_classes, normalization
    )


def _resolve_augment(augment: str, dataset: Dataset) -> str:
    if augment == "auto":
        return default_augment(dataset)
    check_augment(augment)
    if augment != "none" and len(dataset.input_shape) != 3:
        raise ConfigError(
            f'the augmentation "{augment}" is for images, not for inputs of shape {dataset.input_shape}',
            where="augment",
            fix="set augment to none",
        )
    return augment


def _normalized(examples: Examples | None, normalization: Normalization) -> Examples | None:
    return None if examples is None else Examples(normalization.apply(examples.x), examples.y)


def _client_data(
    own: Examples, client_id: str, num_classes: int, seed: int, validation_fraction: float, augment: str
) -> ClientData:
    kept, held = stratified_split(own.y.numpy(), validation_fraction, Rng(seed).numpy("validation", client_id))
    return ClientData(train=own.subset(kept), validation=own.subset(held), num_classes=num_classes, augment=augment)


def _converted(dataset: Any, name: str) -> Examples:
    try:
        return from_python(dataset)
    except DataError as error:
        raise DataError(error.what, where=name, fix=error.fix) from None
