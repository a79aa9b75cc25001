"""The objects of a run before its method: who holds what, with which model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedfuse import models
from fedfuse.core.artifact import ModelSpec
from fedfuse.core.errors import ConfigError, did_you_mean
from fedfuse.core.examples import Examples
from fedfuse.core.registry import SOURCES
from fedfuse.core.seeding import derive_seed
from fedfuse.core.settings import to_json
from fedfuse.data.attacks import HostileClients
from fedfuse.data.dataset import Dataset
from fedfuse.data.federate import FederatedData, federate, from_clients
from fedfuse.data.labels import LabelSetting
from fedfuse.data.membership import own_part, with_late_client, without_clients
from fedfuse.data.normalize import KNOWN, Normalization
from fedfuse.data.server import HeldOut, check_server_data, server_inputs, unlabelled
from fedfuse.data.sources.remote import Remote
from fedfuse.experiment.configuration import (
    Config,
    attack_of,
    family_of,
    named,
    partition_of,
    server_part_of,
    source_of,
)
from fedfuse.experiment.embedding import Embedder
from fedfuse.models.graph import user_spec


@dataclass(frozen=True)
class Setting:
    """Data and models of one federation.

    Args:
        data: the clients' data and the test set.
        model: the common model.
        client_models: client id to a model of its own.
        hostile: who attacks in this simulation, and how.
    """

    data: FederatedData
    model: ModelSpec
    client_models: Mapping[str, ModelSpec] = field(default_factory=dict)
    hostile: HostileClients | None = None

    def without_clients(self) -> Setting:
        """The same federation as its server sees it: with nobody's data."""
        return replace(self, data=replace(self.data, clients={}, positions={}))


class Loader:
    """Makes settings from a configuration; the data set is loaded once for all seeds.

    Args:
        config: the configuration.
        server_data: data of the server's own, from a program, instead of what the configuration says.
        like: a loader whose data set is used again where both configurations name the same.
    """

    def __init__(self, config: Config, server_data: Any = None, like: Loader | None = None) -> None:
        self.config = config
        self._dataset: Dataset | None = None
        self._embedder = Embedder()
        self._server: Examples | HeldOut | None = None if server_data is None else server_inputs(server_data)
        if like is not None and _read_alike(like.config, config):
            self._dataset, self._server = like._dataset, self._server or like._server
            self._embedder = like._embedder

    def dataset(self) -> Dataset:
        """The data set that the configuration names, within its limits."""
        if self._dataset is None:
            data = self.config.data
            loaded = source_of(data).load(limit=data.limit, test_limit=data.test_limit)
            self._dataset = loaded.limited(data.limit, data.test_limit)
        return self._dataset

    def server_part(self) -> Examples | HeldOut | None:
        """The server's examples, or how its part is held out; ``None`` where it has no data."""
        section = self.config.data.server
        if self._server is None and section is not None:
            part = server_part_of(section)
            if isinstance(part, HeldOut):
                return part
            with warnings.catch_warnings():
                # The server's data is never tested on.
                warnings.filterwarnings("ignore", message=".* has no test part")
                self._server = part.load(limit=section.limit).limited(section.limit).train
        return self._server

    def late_datasets(self) -> dict[str, Dataset]:
        """The data of the clients that are beside the partition, by client id."""
        late = sorted(self.config.data.late.items())
        return {client_id: self._read(table, f"data.late.{client_id}") for client_id, table in late}

    def _read(self, table: Mapping[str, Any], where: str) -> Dataset:
        """The data set of a table with a ``source`` and its settings."""
        settings = dict(table)
        name = settings.pop("source", None)
        if not isinstance(name, str):
            known = ", ".join(SOURCES.names())
            raise ConfigError('the setting "source" is missing', where=f"{where}.source", fix=f"known: {known}")
        with warnings.catch_warnings():
            # Such a set is one part, with nothing to test on.
            warnings.filterwarnings("ignore", message=".*has no test part")
            loaded: Dataset = named(SOURCES, name, settings, where, "source").load()
        return loaded

    def setting(self, seed: int) -> Setting:
        """The federation for one seed.

        Args:
            seed: decides who holds what, validation parts and first weights.

        Raises:
            ConfigError: a model is given to a client that there is not.
        """
        config = self.config
        if config.data.source == "remote":
            if config.attack is not None:
                raise ConfigError("attacks are for simulations", where="attack", fix="leave this section out")
            return self._remote(seed)
        partition = partition_of(config.data)[1]
        data = federate(
            self.dataset(),
            partition,
            seed=seed,
            validation_fraction=config.data.validation_fraction,
            normalize=config.data.normalize,
            augment=config.data.augment,
            server=self.server_part(),
            server_is_labelled=config.data.server is not None and config.data.server.labelled,
            labels=label_setting(config),
            resize=config.data.resize,
            embed=self._embedder.of(config, partition),
        )
        hostile = None
        if config.attack is not None:
            # Chosen before anybody leaves: who is removed later makes nobody else hostile.
            hostile = HostileClients.among(data, config.attack.name, attack_of(config.attack), config.attack.clients)
            data = hostile.poisoned(data, seed)
        known = [*data.clients, *config.data.late]
        data = without_clients(data, config.data.without)
        for client_id, dataset in self.late_datasets().items():
            data = with_late_client(
                data,
                client_id,
                dataset,
                seed=seed,
                validation_fraction=config.data.validation_fraction,
                labels=label_setting(config),
                resize=config.data.resize,
            )

        for client_id in config.model.clients:
            if client_id not in known:
                fix = did_you_mean(client_id, known)
                raise ConfigError(f'there is no client "{client_id}"', where=f"model.clients.{client_id}", fix=fix)
        setting = self._with_models(data, sorted(set(config.model.clients) & set(data.clients)), seed)
        return replace(setting, hostile=hostile)

    def _remote(self, seed: int) -> Setting:
        """The federation as its server sees it: nobody's data, and perhaps a test set."""
        section = self.config.data
        remote: Remote = source_of(section)
        if isinstance(section.normalize, dict):
            normalization = Normalization(*(tuple(section.normalize.get(key, ())) for key in ("mean", "std")))
        elif section.normalize == "auto" and remote.is_pixels:
            normalization = Normalization(*[(0.5,) * remote.input_shape[0]] * 2)
        else:
            normalization = KNOWN.get(section.normalize, Normalization())
        data = FederatedData(
            clients={},
            test=None,
            class_names=tuple(remote.class_names),
            input_shape=tuple(remote.input_shape),
            num_classes=len(remote.class_names),
            normalization=normalization,
            is_pixels=remote.is_pixels,
            augment="none" if section.augment == "auto" else section.augment,
        )
        if remote.test is not None:
            loaded = self._read(remote.test, "data.test")
            test = own_part(
                data,
                "test",
                loaded.limited(section.test_limit),
                seed=seed,
                validation_fraction=0.0,
                labels=label_setting(self.config),
                resize=section.resize,
                where="data.test",
            )
            data = replace(data, test=test.train)
        server = self.server_part()
        if isinstance(server, HeldOut):
            raise ConfigError(
                "a part of data that stay with their owners cannot be held out",
                where="data.server",
                fix="give the server's data a source of its own",
            )
        if server is not None:
            check_server_data(server, data.input_shape, None)
            own = server if section.server is not None and section.server.labelled else unlabelled(server.x)
            data = replace(data, server=Examples(normalization.apply(own.x), own.y))
        return self._with_models(data, sorted(self.config.model.clients), seed)

    def _with_models(self, data: FederatedData, owners: Sequence[str], seed: int) -> Setting:
        def spec(client_id: str = "") -> ModelSpec:
            name, family = family_of(self.config.model, client_id)
            return models.spec(
                name,
                to_json(family),
                input_shape=data.input_shape,
                num_classes=data.num_classes,
                seed=derive_seed(seed, "model"),
            )

        return Setting(data, spec(), {client_id: spec(client_id) for client_id in owners})


def _read_alike(first: Config, second: Config) -> bool:
    """Whether both read the same files: who gets which examples does not matter."""
    return first.data.model_copy(update={"partition": {}}) == second.data.model_copy(update={"partition": {}})


def label_setting(config: Config) -> LabelSetting:
    """Own names of classes to common ones, as texts.

    Args:
        config: the configuration.
    """
    return {
        str(key): {str(name): str(target) for name, target in value.items()} if isinstance(value, dict) else str(value)
        for key, value in config.data.labels.items()
    }


def own_setting(
    model: Any,
    clients: Any,
    test: Any,
    *,
    seed: int,
    validation_fraction: float,
    server_data: Any = None,
    class_names: Sequence[str] | None = None,
    labels: LabelSetting | None = None,
    resize: int | None = None,
) -> Setting:
    """The federation of a user's own model and data.

    Args:
        model: a module, or a function that makes one.
        clients: data sets by position or by client id.
        test: a data set or nothing.
        seed: decides validation parts and, for a function, first weights.
        validation_fraction: part of each client's data that is set apart.
        server_data: inputs of the server's own, or nothing.
        class_names: name of each class; labels may then be texts.
        labels: own name of a class to its name in ``class_names``, or client id to such a table.
        resize: side in pixels that all images are brought to.

    Raises:
        ConfigError: model or clients are missing.
    """
    if model is None or clients is None:
        raise ConfigError(
            "there is nothing to run", where="fedfuse.run", fix="give a configuration, or model= and clients="
        )
    # Data of one's own is taken as it is: it comes ready for the model that comes with it.
    data = from_clients(
        {str(client_id): part for client_id, part in clients.items()} if isinstance(clients, Mapping) else clients,
        test,
        seed=seed,
        class_names=class_names,
        validation_fraction=validation_fraction,
        normalize="none",
        augment="none",
        server=server_data,
        labels=labels,
        resize=resize,
    )
    seed_of_model = derive_seed(seed, "model")
    spec = user_spec(model, input_shape=data.input_shape, num_classes=data.num_classes, seed=seed_of_model)
    return Setting(data, spec)
