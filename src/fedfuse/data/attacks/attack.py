"""What an attack is, and who carries it out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError, did_you_mean
from fedfuse.core.examples import ClientData, Examples
from fedfuse.core.seeding import Rng
from fedfuse.data.federate import FederatedData
from fedfuse.data.normalize import Normalization


@dataclass(frozen=True)
class Inputs:
    """What an attacker knows of the task: what every client knows.

    Args:
        num_classes: of the whole task.
        normalization: what was applied to all inputs.
    """

    num_classes: int
    normalization: Normalization


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Base of all attacks. A hostile client does what the method asks, but on poisoned data, or it forges its answer.

    ``forges_buffers``: whether ``forge`` also sees a model's buffers. Most attacks leave running variances alone: a
    negative one would be seen at once.
    """

    forges_buffers: ClassVar[bool] = False

    @property
    def forges_uploads(self) -> bool:
        """Whether answers are forged at all."""
        return type(self).forge is not Attack.forge

    def poison(self, examples: Examples, inputs: Inputs, rng: Rng) -> Examples:
        """What a hostile client trains on instead of its own examples.

        Args:
            examples: the client's own, normalised.
            inputs: what it knows of the task.
            rng: its random source for this.
        """
        return examples

    def forge(self, values: Tensor, start: Tensor, generator: torch.Generator) -> Tensor:
        """What a hostile client sends instead of a tensor.

        Args:
            values: what an honest client would send, float64.
            start: what it was sent under that key, or the first weights; zeros where there is neither. Same shape.
            generator: where random numbers are drawn from.

        Returns:
            The same shape.
        """
        return values

    def wanted(self, test: Examples, inputs: Inputs) -> Examples | None:
        """Test inputs with the labels that the attacker wants them to have; the share that has them is its success.

        Args:
            test: honest test examples, normalised.
            inputs: what it knows of the task.

        Returns:
            Examples whose wanted label is not the true one; ``None`` for an attack that wants no certain label.
        """
        return None


@dataclass(frozen=True)
class HostileClients:
    """Who attacks, and how.

    Args:
        name: of the attack in the registry.
        attack: its settings.
        clients: ids of those that carry it out, sorted.
    """

    name: str
    attack: Attack
    clients: tuple[str, ...]

    @classmethod
    def among(cls, data: FederatedData, name: str, attack: Attack, clients: int | Sequence[str]) -> HostileClients:
        """Choose the hostile clients.

        Args:
            data: the federation.
            name: of the attack.
            attack: its settings.
            clients: their ids, or how many: the first in the order of ids.

        Raises:
            ConfigError: there are no such clients, or not so many.
        """
        if isinstance(clients, int):
            if not 0 <= clients <= len(data.clients):
                raise ConfigError(
                    f"{clients} of {len(data.clients)} clients cannot be hostile",
                    where="attack.clients",
                    fix=f"give a number from 0 to {len(data.clients)}, or a list of ids",
                )
            return cls(name, attack, tuple(sorted(data.clients)[:clients]))
        for client_id in clients:
            if client_id not in data.clients:
                raise ConfigError(
                    f'there is no client "{client_id}"',
                    where="attack.clients",
                    fix=did_you_mean(client_id, data.clients),
                )
        return cls(name, attack, tuple(sorted(set(clients))))

    def poisoned(self, data: FederatedData, seed: int) -> FederatedData:
        """The federation with the hostile clients' data, validation parts among them, as the attack makes it.

        Args:
            data: the federation; the test part stays as it is.
            seed: of the run.
        """
        inputs = Inputs(data.num_classes, data.normalization)

        def poisoned(client_id: str, part: ClientData) -> ClientData:
            rng = Rng(seed).child("attack", client_id)
            train = self.attack.poison(part.train, inputs, rng.child("train"))
            validation = self.attack.poison(part.validation, inputs, rng.child("validation"))
            return dataclasses.replace(part, train=train, validation=validation)

        clients = {
            client_id: poisoned(client_id, part) if client_id in self.clients else part
            for client_id, part in data.clients.items()
        }
        return dataclasses.replace(data, clients=clients)

    def wanted(self, data: FederatedData) -> Examples | None:
        """Test inputs with the labels that the attackers want; ``None`` where there are none.

        Args:
            data: the federation.
        """
        if data.test is None:
            return None
        found = self.attack.wanted(data.test, Inputs(data.num_classes, data.normalization))
        return found if found is not None and len(found) else None
