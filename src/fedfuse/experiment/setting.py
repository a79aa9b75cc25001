"""The objects of a run before its method: who holds what, with which model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedfuse import models
from fedfuse.core.artifact import ModelSpec
from fedfuse.core.errors import ConfigError, did_you_mean
from fedfuse.core.examples import Examples
from fedfuse.core.registry import SOURCES
from fedfuse.core.seeding import derive_seed
from fedfuse.core.settings import to_json
from fedfuse.data.dataset import Dataset
from fedfuse.data.federate import FederatedData, federate, from_clients
from fedfuse.data.labels import LabelSetting
from fedfuse.data.membership import with_late_client, without_clients
from fedfuse.data.server import HeldOut, server_inputs
from fedfuse.experiment.configuration import Config, family_of, named, partition_of, server_part_of, source_of
from fedfuse.models.graph import user_spec


@dataclass(frozen=True)
class Setting:
    """Data and models of one federation.

    Args:
        data: the clients' data and the test set.
        model: the common model.
        client_models: client id to a model of its own.
    """

    data: FederatedData
    model: ModelSpec
    client_models: Mapping[str, ModelSpec] = field(default_factory=dict)


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
        self._server: Examples | HeldOut | None = None if server_data is None else server_inputs(server_data)
        if like is not None and _read_alike(like.config, config):
            self._dataset, self._server = like._dataset, self._server or like._server

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
        found = {}
        for client_id, table in sorted(self.config.data.late.items()):
            where = f"data.late.{client_id}"
            settings = dict(table)
            name = settings.pop("source", None)
            if not isinstance(name, str):
                known = ", ".join(SOURCES.names())
                raise ConfigError('the setting "source" is missing', where=f"{where}.source", fix=f"known: {known}")
            with warnings.catch_warnings():
                # Nothing is tested on a client's data.
                warnings.filterwarnings("ignore", message=".*has no test part")
                found[client_id] = named(SOURCES, name, settings, where, "source").load()
        return found

    def setting(self, seed: int) -> Setting:
        """The federation for one seed.

        Args:
            seed: decides who holds what, validation parts and first weights.

        Raises:
            ConfigError: a model is given to a client that there is not.
        """
        config = self.config
        data = federate(
            self.dataset(),
            partition_of(config.data)[1],
            seed=seed,
            validation_fraction=config.data.validation_fraction,
            normalize=config.data.normalize,
            augment=config.data.augment,
            server=self.server_part(),
            server_is_labelled=config.data.server is not None and config.data.server.labelled,
            labels=_label_setting(config),
            resize=config.data.resize,
        )

        known = [*data.clients, *config.data.late]
        data = without_clients(data, config.data.without)
        for client_id, dataset in self.late_datasets().items():
            data = with_late_client(
                data,
                client_id,
                dataset,
                seed=seed,
                validation_fraction=config.data.validation_fraction,
                labels=_label_setting(config),
                resize=config.data.resize,
            )

        def spec(client_id: str = "") -> ModelSpec:
            name, family = family_of(config.model, client_id)
            return models.spec(
                name,
                to_json(family),
                input_shape=data.input_shape,
                num_classes=data.num_classes,
                seed=derive_seed(seed, "model"),
            )

        for client_id in config.model.clients:
            if client_id not in known:
                fix = did_you_mean(client_id, known)
                raise ConfigError(f'there is no client "{client_id}"', where=f"model.clients.{client_id}", fix=fix)
        own = sorted(set(config.model.clients) & set(data.clients))
        return Setting(data, spec(), {client_id: spec(client_id) for client_id in own})


def _read_alike(first: Config, second: Config) -> bool:
    """Whether both read the same files: who gets which examples does not matter."""
    return first.data.model_copy(update={"partition": {}}) == second.data.model_copy(update={"partition": {}})


def _label_setting(config: Config) -> LabelSetting:
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
