"""The objects of a run before its method: who holds what, with which model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedfuse import models
from fedfuse.core.artifact import ModelSpec
from fedfuse.core.errors import ConfigError, did_you_mean
from fedfuse.core.seeding import derive_seed
from fedfuse.core.settings import to_json
from fedfuse.data.dataset import Dataset
from fedfuse.data.federate import FederatedData, federate, from_clients
from fedfuse.data.from_python import from_python
from fedfuse.experiment.configuration import Config, family_of, partition_of, source_of
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
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self._dataset: Dataset | None = None

    def dataset(self) -> Dataset:
        """The data set that the configuration names, within its limits."""
        if self._dataset is None:
            data = self.config.data
            loaded = source_of(data).load(limit=data.limit, test_limit=data.test_limit)
            self._dataset = loaded.limited(data.limit, data.test_limit)
        return self._dataset

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
            if client_id not in data.clients:
                fix = did_you_mean(client_id, data.clients)
                raise ConfigError(f'there is no client "{client_id}"', where=f"model.clients.{client_id}", fix=fix)
        return Setting(data, spec(), {client_id: spec(client_id) for client_id in sorted(config.model.clients)})


def own_setting(model: Any, clients: Any, test: Any, *, seed: int, validation_fraction: float) -> Setting:
    """The federation of a user's own model and data.

    Args:
        model: a module, or a function that makes one.
        clients: data sets by position or by client id.
        test: a data set or nothing.
        seed: decides validation parts and, for a function, first weights.
        validation_fraction: part of each client's data that is set apart.

    Raises:
        ConfigError: model or clients are missing.
    """
    if model is None or clients is None:
        raise ConfigError(
            "there is nothing to run", where="fedfuse.run", fix="give a configuration, or model= and clients="
        )
    if isinstance(clients, Mapping):
        parts: Any = {str(client_id): from_python(part) for client_id, part in clients.items()}
    else:
        parts = [from_python(part) for part in clients]
    # Data of one's own is taken as it is: it comes ready for the model that comes with it.
    data = from_clients(
        parts,
        None if test is None else from_python(test),
        seed=seed,
        validation_fraction=validation_fraction,
        normalize="none",
        augment="none",
    )
    seed_of_model = derive_seed(seed, "model")
    spec = user_spec(model, input_shape=data.input_shape, num_classes=data.num_classes, seed=seed_of_model)
    return Setting(data, spec)
