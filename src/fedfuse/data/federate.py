"""A data set and a partition to the clients of a federation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.examples import ClientData, Examples, InputSpace
from fedfuse.core.seeding import Rng
from fedfuse.data.augment import check_augment, default_augment
from fedfuse.data.checks import check_fraction
from fedfuse.data.dataset import Dataset
from fedfuse.data.from_python import from_python
from fedfuse.data.labels import LabelSetting, LabelTables, Numbering
from fedfuse.data.normalize import Normalization, resolve_normalization
from fedfuse.data.partitions.assignment import Embed, Partition, SeesInputs, check_assignment, client_ids
from fedfuse.data.resizing import resized
from fedfuse.data.server import HeldOut, check_server_data, server_inputs, unlabelled
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
        is_pixels: whether inputs were images with values in [0, 1] before they were normalised.
        server: the server's own data, normalised; ``None`` where it has none. Labels of -1 say that it has inputs only.
        augment: name of the augmentation that clients train with.
    """

    clients: Mapping[str, ClientData]
    test: Examples | None
    class_names: tuple[str, ...]
    input_shape: tuple[int, ...]
    num_classes: int
    normalization: Normalization
    positions: Mapping[str, np.ndarray] = field(default_factory=dict)
    is_pixels: bool = False
    server: Examples | None = None
    augment: str = "none"

    @property
    def inputs(self) -> InputSpace:
        """What inputs look like, for those who must make some without having seen any."""
        return InputSpace(self.normalization.mean, self.normalization.std, self.is_pixels, self.augment)

    def label_counts(self) -> np.ndarray:
        """Examples per client and class, training and validation together.

        Returns:
            int64, shape ``(num_clients, num_classes)``, rows in client order.
        """
        rows = [
            np.bincount(torch.cat([data.train.y, data.validation.y]).numpy(), minlength=self.num_classes)
            for data in self.clients.values()
        ]
        return np.array(rows, dtype=np.int64).reshape(len(rows), self.num_classes)


def federate(
    dataset: Dataset,
    partition: Partition,
    *,
    seed: int,
    validation_fraction: float = 0.1,
    normalize: str | Normalization | Mapping[str, Sequence[float]] = "auto",
    augment: str = "auto",
    server: HeldOut | Examples | None = None,
    server_is_labelled: bool = False,
    labels: LabelSetting | None = None,
    resize: int | None = None,
    embed: Embed | None = None,
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
        server: data of the server's own: a part to hold out before clients get theirs, or examples of the same shape.
        server_is_labelled: whether the server knows the labels of its data; else they are all -1.
        labels: own name of a class to the common name, for all clients and the test part; under a client's id, a
            table of that client's own.
        resize: side in pixels that all images are brought to; ``None`` keeps the images' own.
        embed: makes vectors of the training examples by a model, for partitions that go by them.

    Returns:
        Clients in sorted order.

    Raises:
        ConfigError: a setting cannot be used.
        DataError: the partition cannot be made, or is none; or the server's data does not fit.
    """
    check_fraction("validation_fraction", validation_fraction)
    dataset = _resized(dataset, resize)
    augment = _resolve_augment(augment, dataset)
    normalization = resolve_normalization(normalize, dataset)
    kept, held = _server_part(dataset, server, seed)
    columns = dict(dataset.columns)
    if isinstance(partition, SeesInputs):
        columns |= partition.columns_of(dataset, embed)
    found = partition.assign(
        dataset.train.y.numpy()[kept],
        dataset.num_classes,
        Rng(seed).child("partition").numpy(),
        {name: column[kept] for name, column in columns.items()},
    )
    positions = {client_id: kept[rows] for client_id, rows in check_assignment(found, len(kept)).items()}
    dataset = _with_common_classes(dataset, positions, LabelTables.of(labels))
    clients = {}
    for client_id, rows in positions.items():
        own = dataset.train.subset(rows)
        own = Examples(normalization.apply(own.x), own.y)
        clients[client_id] = _client_data(own, client_id, dataset.num_classes, seed, validation_fraction, augment)
    if isinstance(server, Examples):
        own_data: Examples | None = server if resize is None else resized(server, resize)
    else:
        own_data = dataset.train.subset(held) if len(held) else None
    if own_data is not None:
        check_server_data(own_data, dataset.input_shape, dataset.test)
        own_data = own_data if server_is_labelled else unlabelled(own_data.x)
    return FederatedData(
        clients,
        _normalized(dataset.test, normalization),
        dataset.class_names,
        dataset.input_shape,
        dataset.num_classes,
        normalization,
        positions,
        is_pixels=_is_pixels(dataset),
        server=_normalized(own_data, normalization),
        augment=augment,
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
    server: Any = None,
    labels: LabelSetting | None = None,
    resize: int | None = None,
) -> FederatedData:
    """Make a federation of data that is already split.

    Args:
        clients: one data set per client, of any kind that :func:`fedfuse.data.from_python` takes; by client id, or in
            a sequence whose clients are then called ``client_0``, ``client_1``, ...
        test: the server's test part, of any such kind; for the report only.
        seed: of the run; validation parts are drawn from it.
        class_names: name of each class, the same list for all; labels may then be texts. Numbers where not given, as
            many as the largest label tells.
        validation_fraction: share of each client's examples that becomes its validation part, in [0, 1).
        normalize: as for :func:`federate`; ``auto`` measures over all clients.
        augment: as for :func:`federate`.
        server: inputs of the server's own, of any such kind or a tensor or array of inputs; labels are left out.
        labels: a client's own name of a class to its name in ``class_names``, for all clients and the test part, or
            under a client's id a table of that client's own; numbers count as their digits.
        resize: side in pixels that all images are brought to; ``None`` keeps the images' own.

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
    tables = LabelTables.of(labels)
    tables.check_clients(list(clients))
    if labels and class_names is None:
        raise ConfigError(
            "labels are mapped to the common list of classes, and there is none",
            where="labels",
            fix='give class_names=["cat", "dog"]',
        )

    def read(given: Any, name: str) -> Examples:
        number = None if class_names is None else Numbering(tuple(class_names), tables.table(name))
        part = _converted(given, name, number)
        return part if resize is None else resized(part, resize)

    parts = {client_id: read(clients[client_id], client_id) for client_id in sorted(clients)}
    test_part = None if test is None else read(test, "test")
    first = next(iter(parts.values()))
    for client_id, part in parts.items():
        if part.x.shape[1:] != first.x.shape[1:]:
            raise DataError(
                f"inputs have shape {tuple(part.x.shape[1:])} here and {tuple(first.x.shape[1:])} "
                f"at {next(iter(parts))}",
                where=client_id,
                fix="bring the inputs of all clients to one shape"
                + ("; resize=28 brings all images to 28 x 28 pixels" if _differ_in_size(part.x, first.x) else ""),
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
    own_data = None if server is None else server_inputs(server)
    if own_data is not None:
        own_data = own_data if resize is None else resized(own_data, resize)
        check_server_data(own_data, dataset.input_shape, test_part)
    return FederatedData(
        data,
        _normalized(test_part, normalization),
        names,
        dataset.input_shape,
        dataset.num_classes,
        normalization,
        is_pixels=_is_pixels(dataset),
        server=_normalized(own_data, normalization),
        augment=augment,
    )


def _server_part(dataset: Dataset, server: HeldOut | Examples | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training part for the clients, and those for the server."""
    everything = np.arange(len(dataset.train), dtype=np.int64)
    if not isinstance(server, HeldOut):
        return everything, everything[:0]
    held = server.rows(dataset, Rng(seed).numpy("server data"))
    return np.setdiff1d(everything, held), held


def _resized(dataset: Dataset, side_px: int | None) -> Dataset:
    if side_px is None:
        return dataset
    test = None if dataset.test is None else resized(dataset.test, side_px)
    return replace(dataset, train=resized(dataset.train, side_px), test=test)


def _differ_in_size(first: Tensor, second: Tensor) -> bool:
    """Whether both are images of the same number of channels."""
    return first.dim() == second.dim() == 4 and first.shape[1] == second.shape[1]


def _with_common_classes(dataset: Dataset, positions: Mapping[str, np.ndarray], tables: LabelTables) -> Dataset:
    """The data set with the common classes in place of its own names; what no client has, has the names of all."""
    if not tables.common and not tables.own:
        return dataset
    tables.check_clients(list(positions))
    y = dataset.train.y.clone()
    rest = np.setdiff1d(np.arange(len(y)), np.concatenate(list(positions.values())))
    owners = {**positions, "rest": rest}
    used = {owner: y[rows].unique().tolist() for owner, rows in owners.items()}
    test = dataset.test
    if test is not None:
        used["test"] = test.y.unique().tolist()
    names = tables.class_names(dataset.class_names, used)
    for owner, rows in owners.items():
        y[rows] = tables.numbers(owner, dataset.class_names, names)[y[rows]]
    if test is not None:
        test = Examples(test.x, tables.numbers("test", dataset.class_names, names)[test.y])
    return replace(dataset, train=Examples(dataset.train.x, y), test=test, class_names=names)


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


def _is_pixels(dataset: Dataset) -> bool:
    x = dataset.train.x
    return dataset.is_image and x.is_floating_point() and float(x.min()) >= 0 and float(x.max()) <= 1


def _normalized(examples: Examples | None, normalization: Normalization) -> Examples | None:
    return None if examples is None else Examples(normalization.apply(examples.x), examples.y)


def _client_data(
    own: Examples, client_id: str, num_classes: int, seed: int, validation_fraction: float, augment: str
) -> ClientData:
    kept, held = stratified_split(own.y.numpy(), validation_fraction, Rng(seed).numpy("validation", client_id))
    return ClientData(train=own.subset(kept), validation=own.subset(held), num_classes=num_classes, augment=augment)


def _converted(dataset: Any, name: str, number: Numbering | None) -> Examples:
    try:
        return from_python(dataset, number)
    except DataError as error:
        fix = error.fix
        if error.what == "the labels are not numbers" or "is not a whole number: '" in error.what:
            fix += ", or give class_names for labels that are texts"
        raise DataError(error.what, where=name, fix=fix) from None
