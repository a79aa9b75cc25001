"""Clients that leave a federation, and clients that come late with data of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import torch

from fedfuse.core.errors import ConfigError, DataError, did_you_mean
from fedfuse.core.examples import ClientData, Examples
from fedfuse.core.seeding import Rng
from fedfuse.data.dataset import Dataset
from fedfuse.data.federate import FederatedData
from fedfuse.data.labels import LabelSetting, LabelTables, Numbering
from fedfuse.data.resizing import resized
from fedfuse.data.splitting import stratified_split


def without_clients(data: FederatedData, client_ids: Collection[str]) -> FederatedData:
    """The federation without some clients; the others hold what they held.

    Constants of normalisation that were measured on everybody's data stay as they are.

    Args:
        data: the federation.
        client_ids: who is not there.

    Raises:
        ConfigError: there is no such client, or none is left.
    """
    for client_id in client_ids:
        if client_id not in data.clients:
            raise ConfigError(
                f'there is no client "{client_id}"', where="data.without", fix=did_you_mean(client_id, data.clients)
            )
    clients = {client_id: part for client_id, part in data.clients.items() if client_id not in client_ids}
    if not clients:
        raise ConfigError("no client is left", where="data.without", fix="leave at least one")
    positions = {client_id: rows for client_id, rows in data.positions.items() if client_id in clients}
    return dataclasses.replace(data, clients=clients, positions=positions)


def with_late_client(
    data: FederatedData,
    client_id: str,
    dataset: Dataset,
    *,
    seed: int,
    validation_fraction: float,
    labels: LabelSetting | None = None,
    resize: int | None = None,
) -> FederatedData:
    """The federation with one more client, whose data came from elsewhere.

    Its inputs are normalised like everybody's, and its classes are found by name, or by number where they have none.

    Args:
        data: the federation.
        client_id: the new client; not one that is there.
        dataset: its examples; a test part is not used.
        seed: of the run; the client's validation part is drawn from it.
        validation_fraction: share of its examples that becomes its validation part.
        labels: own name of a class to the common name, for all or under a client's id.
        resize: side in pixels that images are brought to.

    Raises:
        ConfigError: there is a client of that name.
        DataError: the data do not fit the federation's.
    """
    where = f"data.late.{client_id}"
    if client_id in data.clients:
        raise ConfigError(f'there is a client "{client_id}" already', where=where, fix="give another name")
    part = own_part(
        data,
        client_id,
        dataset,
        seed=seed,
        validation_fraction=validation_fraction,
        labels=labels,
        resize=resize,
        where=where,
    )
    return dataclasses.replace(data, clients=dict(sorted({**data.clients, client_id: part}.items())))


def own_part(
    data: FederatedData,
    client_id: str,
    dataset: Dataset,
    *,
    seed: int,
    validation_fraction: float,
    labels: LabelSetting | None = None,
    resize: int | None = None,
    where: str = "",
) -> ClientData:
    """The data of a client that brings a data set of its own, as the federation sees it.

    Inputs are normalised like everybody's, and classes are found by name, or by number where they have none.

    Args:
        data: the federation; its clients are not looked at.
        client_id: the client.
        dataset: its examples; a test part is not used.
        seed: of the run; the validation part is drawn from it.
        validation_fraction: share of the examples that becomes its validation part.
        labels: own name of a class to the common name, for all or under a client's id.
        resize: side in pixels that images are brought to.
        where: what messages call the data; the client if left out.

    Raises:
        DataError: the data do not fit the federation's.
    """
    where = where or client_id
    own = dataset.train if resize is None else resized(dataset.train, resize)
    if tuple(own.x.shape[1:]) != data.input_shape:
        raise DataError(
            f"inputs have shape {tuple(own.x.shape[1:])} here and {data.input_shape} at the other clients",
            where=where,
            fix="bring the inputs of all clients to one shape",
        )
    number = Numbering(data.class_names, LabelTables.of(labels).table(client_id))
    present = own.y.unique().tolist()
    numbers = torch.full((dataset.num_classes,), -1)
    try:
        for y in present:
            numbers[y] = number(_label(dataset.class_names[y], data.class_names))
    except DataError as error:
        raise DataError(error.what, where=where, fix="map it to a common class in data.labels") from None
    own = Examples(data.normalization.apply(own.x), numbers[own.y])
    kept, held = stratified_split(own.y.numpy(), validation_fraction, Rng(seed).numpy("validation", client_id))
    return ClientData(own.subset(kept), own.subset(held), data.num_classes, data.augment)


def _label(name: str, class_names: Collection[str]) -> str | int:
    """A name that only says a number is one, unless the common classes are called so."""
    return int(name) if name.isdecimal() and name not in class_names else name
